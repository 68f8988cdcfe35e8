#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU; numpy 2.4.6
# One would guess: The mean of 5,000 twenties in float16 is 20: a mean lies between the smallest and the largest value, and numpy
#   adds up in float32 for it.
# What happens: MLX divides the sum, and that is infinite above 65,504. The mean of 70,000 ones is infinite too, and so is the
#   mean of squares in a norm written by hand: 4,096 values of 4 are enough.
# Seen:
#     mean of 5,000 twenties: mlx inf, numpy 20.0
#     mean of 70,000 ones: mlx inf, numpy 1.0
#     mean of the squares of 4,096 fours: mlx inf, numpy 16.0
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

for name, number, value in (
    ("5,000 twenties", 5_000, 20),
    ("70,000 ones", 70_000, 1),
    ("the squares of 4,096 fours", 4_096, 16),
):
    mean = mx.mean(mx.full((number,), value, dtype=mx.float16)).item()
    wide = np.mean(np.full(number, value, np.float16)).item()
    print(f"mean of {name}: mlx {mean}, numpy {wide}")
    assert mean == float("inf") and wide == value
assert mx.mean(mx.full((100,), 20, dtype=mx.float16)).item() == 20
PYTHON
