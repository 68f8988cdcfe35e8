#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: Two arrays of 64-bit integers, one without a sign, meet in 64 bits: in int64, in float64 as in numpy, or they
#   are refused.
# What happens: They meet in float32, which has 24 bits: any uint64 with any signed array, int8 too. Ids and hashes beyond
#   16,777,216 run together, are equal to their neighbours and are wrong when they come back, without a word. An integer
#   of Python beside a uint64 array is harmless, and uint32 goes to int64.
# Seen:
#     uint64 + int64: float32, uint64 + int8: float32, uint32 + int64: int64
#     16777217 as uint64 == 16777216 as int64: True
#     where(True, 16777217 as uint64, 0 as int32): 16777216
#     16777217 as uint64 + 0 of Python: 16777217
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

def dtype(left, right):
    return str((mx.zeros(1, dtype=left) + mx.zeros(1, dtype=right)).dtype).removeprefix("mlx.core.")

pairs = dtype(mx.uint64, mx.int64), dtype(mx.uint64, mx.int8), dtype(mx.uint32, mx.int64)
print("uint64 + int64: {}, uint64 + int8: {}, uint32 + int64: {}".format(*pairs))
large = mx.array([2**24 + 1], dtype=mx.uint64)
equal = (large == mx.array([2**24], dtype=mx.int64)).item()
print(f"16777217 as uint64 == 16777216 as int64: {equal}")
chosen = int(mx.where(mx.array([True]), large, mx.array([0], dtype=mx.int32)).item())
print(f"where(True, 16777217 as uint64, 0 as int32): {chosen}")
python = (large + 0).item()
print(f"16777217 as uint64 + 0 of Python: {python}")
assert pairs == ("float32", "float32", "int64") and equal and chosen == 2**24 and python == 2**24 + 1
PYTHON
