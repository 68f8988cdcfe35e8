#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: A product with quantized weights in bfloat16 is about as exact as the product with the same weights
#   dequantized.
# What happens: On a CPU it adds up in bfloat16: 1,024 terms are off by some percent, twenty times as much as the plain
#   product.
# Seen:
#     quantized_matmul: 3.2 %
#     dequantize, then a plain product: 0.15 %
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

mx.set_default_device(mx.cpu)
x = mx.random.normal((1, 1024), key=mx.random.key(1)).astype(mx.bfloat16)
w = 0.02 * mx.random.normal((64, 1024), key=mx.random.key(2))
packed, scales, biases = mx.quantize(w.astype(mx.bfloat16), 64, 4)
plain = mx.dequantize(packed, scales, biases, 64, 4)
exact = x.astype(mx.float32) @ plain.astype(mx.float32).T

def off(y):
    return 100 * (mx.linalg.norm(y.astype(mx.float32) - exact) / mx.linalg.norm(exact)).item()

quantized = off(mx.quantized_matmul(x, packed, scales, biases, transpose=True, group_size=64, bits=4))
product = off(x @ plain.T)
print(f"quantized_matmul: {quantized:.1f} %")
print(f"dequantize, then a plain product: {product:.2f} %")
assert quantized > 8 * product and quantized > 1
PYTHON
