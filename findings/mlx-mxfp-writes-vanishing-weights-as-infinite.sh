#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: mx.quantize in mode mxfp4 or mxfp8 writes a group of weights that are nearly zero as zeros, or as what is
#   nearest.
# What happens: The scale is a power of two in 8 bits, and its exponent wraps below the smallest. Normal float32 weights of
#   2^-126 (of 2^-120 in mxfp8) come back infinite, and a group of 2^-130 as 8.5e37. Products
#   with such a row are infinite.
# Seen:
#     mxfp4: 2^-125 -> scale 0, 2.35e-38; 2^-126 -> scale 255, inf; 2^-130 -> scale 251, 8.51e+37
#     mxfp8: 2^-119 -> scale 0, 1.5e-36; 2^-120 -> scale 255, inf; 2^-130 -> scale 245, 8.51e+37
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

def back(mode, bits, exponent):
    parts = mx.quantize(mx.full((1, 32), 2.0**exponent), 32, bits, mode=mode)
    value = mx.dequantize(*parts, group_size=32, bits=bits, mode=mode)[0, 0].item()
    return parts[1].item(), value

for mode, bits, exponents in (("mxfp4", 4, (-125, -126, -130)), ("mxfp8", 8, (-119, -120, -130))):
    seen = [back(mode, bits, exponent) for exponent in exponents]
    print(f"{mode}: " + "; ".join(f"2^{e} -> scale {s}, {v:.3g}" for e, (s, v) in zip(exponents, seen)))
    assert seen[0][0] == 0 and seen[0][1] < 1e-30 and seen[1] == (255, float("inf")) and seen[2][1] > 1e37
PYTHON
