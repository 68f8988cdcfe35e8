#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: The last number of mx.cumsum is about mx.sum of the same array: the cumulated probabilities of a nucleus reach
#   one.
# What happens: cumsum adds up in the dtype of the array, and stands still as soon as a step is below half a unit of the last
#   place: 1,000 probabilities of 0.001 get to a half in bfloat16, and stay there. With uint8 it wraps at 256,
#   where sum gives uint32.
# Seen:
#     bfloat16, 1,000 of 0.001: sum 1.0, last of cumsum 0.5
#     bfloat16, 1,000 ones: sum 1000.0, last of cumsum 256.0
#     uint8, three of 200: sum 600, last of cumsum 88
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

found = []
for name, values in (
    ("bfloat16, 1,000 of 0.001", mx.full((1000,), 0.001, dtype=mx.bfloat16)),
    ("bfloat16, 1,000 ones", mx.ones((1000,), dtype=mx.bfloat16)),
    ("uint8, three of 200", mx.full((3,), 200, dtype=mx.uint8)),
):
    found.append((mx.sum(values).item(), mx.cumsum(values)[-1].item()))
    print(f"{name}: sum {found[-1][0]}, last of cumsum {found[-1][1]}")
assert abs(found[0][0] - 1) < 0.02 and found[0][1] == 0.5
assert found[1:] == [(1000, 256), (600, 88)]
PYTHON
