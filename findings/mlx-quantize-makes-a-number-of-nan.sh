#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: A weight that is not a number is not one when it is quantized and dequantized either, or mx.quantize raises: a
#   broken checkpoint shows in the first logits.
# What happens: It becomes a number. Affine groups give it the value of their edge, fp4 modes write the whole group as zeros, mxfp8
#   as 896, and mx.to_fp8, which has a code for it, writes 448. A model of such weights runs, and is wrong in silence.
# Seen (a group of one NaN and ones, quantized and dequantized: the NaN, the one beside it):
#     affine: 1.0, 1.0
#     mxfp4: 0.0, 0.0
#     mxfp8: 896.0, 896.0
#     nvfp4: 0.0, 0.0
#     to_fp8 of NaN: 448.0, of infinity: 448.0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

weights = mx.ones((32, 64))
weights[0, 0] = float("nan")
seen = {}
for mode in ("affine", "mxfp4", "mxfp8", "nvfp4"):
    seen[mode] = mx.dequantize(*mx.quantize(weights, mode=mode), mode=mode)[0, :2].tolist()
    print(f"{mode}: {seen[mode][0]}, {seen[mode][1]}")
codes = mx.from_fp8(mx.to_fp8(mx.array([float("nan"), float("inf")])), dtype=mx.float32).tolist()
print(f"to_fp8 of NaN: {codes[0]}, of infinity: {codes[1]}")
assert seen == {"affine": [1, 1], "mxfp4": [0, 0], "mxfp8": [896, 896], "nvfp4": [0, 0]} and codes == [448, 448]
PYTHON
