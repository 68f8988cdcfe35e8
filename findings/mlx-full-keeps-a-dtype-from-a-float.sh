#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: mx.full((2,), 0.0, dtype=mx.uint32) is an array of uint32, as numpy's full with a dtype is: the dtype was asked
#   for.
# What happens: An integer dtype is dropped when the value is a float, or an array of floats, and the result is float32. A float
#   dtype is kept, for an integer too. Nothing is said; the next gather or shift with it raises.
# Seen:
#     0.0 as uint32: float32
#     0 as uint32: uint32
#     0 as float16: float16
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

def dtype(value, asked):
    return str(mx.full((2,), value, dtype=asked).dtype).removeprefix("mlx.core.")

seen = [dtype(0.0, mx.uint32), dtype(0, mx.uint32), dtype(0, mx.float16)]
print(f"0.0 as uint32: {seen[0]}\n0 as uint32: {seen[1]}\n0 as float16: {seen[2]}")
assert seen == ["float32", "uint32", "float16"] and dtype(mx.array(0.0), mx.uint32) == "float32"
PYTHON
