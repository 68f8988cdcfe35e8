#!/usr/bin/env bash
# Version: mlx 0.32.4, gguf 0.19.0
# One would guess: What mx.load reads from a GGUF without an error has the values that the format defines, as gguf's own
#   dequantize gives them.
# What happens: Of Q4_K, the commonest type, every second group of 32 gets the scale and minimum of the one before it: about
#   half of the values are wrong, by as much as they are large. BF16 becomes float16: 70000 is infinite and 1e-9
#   is 0. Q2_K and Q6_K are right.
# Seen:
#     Q4_K: 47 % of the values are off by more than 1 % of the largest, the largest by 8.6 of 9.3
#     Q6_K: 0 % of the values are off by more than 1 % of the largest
#     BF16 70000, 1e-9 -> float16 inf, 0.0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

def load(kind, raw):
    file = gguf.GGUFWriter("x.gguf", "test")
    file.add_tensor("w", raw, raw_dtype=kind)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file):
        write()
    file.close()
    return mx.load("x.gguf")["w"]

random, off = np.random.RandomState(0), {}
for kind, scales in ((Type.Q4_K, (0, 2)), (Type.Q6_K, (208,))):
    raw = random.randint(0, 256, (8, gguf.GGML_QUANT_SIZES[kind][1]), dtype=np.uint8)
    for at in scales:  # the float16 scales of a block
        raw[:, at : at + 2] = np.full((8, 1), 0.01, np.float16).view(np.uint8)
    raw = raw.reshape(1, -1)
    meant = gguf.quants.dequantize(raw, kind)
    apart, largest = np.abs(np.array(load(kind, raw).astype(mx.float32)) - meant), np.abs(meant).max()
    off[kind] = (apart > 0.01 * largest).mean()
    most = f", the largest by {apart.max():.1f} of {largest:.1f}" if off[kind] else ""
    print(f"{kind.name}: {100 * off[kind]:.0f} % of the values are off by more than 1 % of the largest{most}")
bits = (np.array([[70000.0, 1e-9] * 16], np.float32).view(np.uint32) >> 16).astype(np.uint16)
read = load(Type.BF16, bits.view(np.uint8).reshape(1, -1))
large, small = read[0, :2].tolist()
print(f"BF16 70000, 1e-9 -> {str(read.dtype).removeprefix('mlx.core.')} {large}, {small}")
assert off[Type.Q4_K] > 0.3 and off[Type.Q6_K] == 0 and read.dtype == mx.float16 and (large, small) == (np.inf, 0)
PYTHON
