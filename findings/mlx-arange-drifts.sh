#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU; numpy 2.4.6
# One would guess: Place i of mx.arange(start, stop, step) is start + i * step, rounded once, as in numpy.
# What happens: Each number is the one before it plus the step, in the dtype of the result: errors add up, and where the step is
#   below half a unit of the last place, it stands still. 10,000 steps of 0.1 are off by a whole step in float32; positions in
#   bfloat16 stop at 256. mx.linspace and mx.arange of integers, cast afterwards, are right.
# Seen (the last number):
#     arange(0, 1000, 0.1) in float32: mlx 999.803, numpy 999.900
#     arange(0, 4000) in float16: mlx 2048, numpy 4000; of integers, then cast: 4000
#     arange(0, 4000) in bfloat16: mlx 256; of integers, then cast: 4000
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
import numpy as np

steps = mx.arange(0, 1000, 0.1)[-1].item(), np.arange(0, 1000, 0.1, dtype=np.float32)[-1]
print(f"arange(0, 1000, 0.1) in float32: mlx {steps[0]:.3f}, numpy {steps[1]:.3f}")
half = mx.arange(0, 4000, dtype=mx.float16)[-1].item(), float(np.arange(0, 4000, dtype=np.float16)[-1])
cast = [mx.arange(0, 4000).astype(dtype)[-1].item() for dtype in (mx.float16, mx.bfloat16)]
brain = mx.arange(0, 4000, dtype=mx.bfloat16)[-1].item()
print(f"arange(0, 4000) in float16: mlx {half[0]:.0f}, numpy {half[1]:.0f}; of integers, then cast: {cast[0]:.0f}")
print(f"arange(0, 4000) in bfloat16: mlx {brain:.0f}; of integers, then cast: {cast[1]:.0f}")
assert abs(steps[0] - 999.9) > 0.09 and abs(steps[1] - 999.9) < 0.001
assert half == (2048, 4000) and brain == 256 and cast == [4000, 4000]
PYTHON
