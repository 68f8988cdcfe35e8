#!/usr/bin/env bash
# Version: mlx 0.32.4, mx.distributed with the ring backend, three processes on one machine
# One would guess: all_sum adds up what the ranks have at a place, as mx.sum over the ranks would: the same numbers give the same
#   sum wherever in the array they lie, and 8-bit integers do not wrap. all_max of a NaN is NaN, as mx.max has it.
# What happens: The ring cuts the array into as many pieces as there are ranks, and adds each in another order, rounding to the
#   dtype between: in bfloat16 256 + 1 + 1 is 256 in one piece and 258 in another. All ranks get the same. uint8 wraps, and
#   all_max and all_min drop a NaN.
# Seen (the ranks have 256, 1 and 1, in bfloat16, at each of 3,000 places):
#     2000 places of 256, 1000 of 258; the same on all ranks: True
#     uint8, 100 on each rank: all_sum 44, mx.sum 300
#     NaN, 1 and 1: all_max 1.0, mx.max nan
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
cat > rank.py <<'PYTHON'
import json
import mlx.core as mx

group = mx.distributed.init(strict=True, backend="ring")
rank = group.rank()
sums = mx.distributed.all_sum(mx.full((3000,), [256.0, 1.0, 1.0][rank], dtype=mx.bfloat16)).astype(mx.float32).tolist()
octet = mx.distributed.all_sum(mx.array([100], dtype=mx.uint8)).item()
largest = mx.distributed.all_max(mx.array([[float("nan"), 1.0, 1.0][rank]])).item()
with open(f"{rank}.json", "w") as file:
    json.dump([sums, octet, largest], file)
PYTHON
cat > hosts.json <<'JSON'
[["127.0.0.1:32611"], ["127.0.0.1:32612"], ["127.0.0.1:32613"]]
JSON
for rank in 0 1 2; do MLX_RANK=$rank MLX_HOSTFILE=hosts.json timeout 60 env/bin/python rank.py & done
wait
env/bin/python - <<'PYTHON'
import json, math
import mlx.core as mx

(sums, octet, largest), *others = [json.load(open(f"{rank}.json")) for rank in range(3)]
same = all(other[0] == sums for other in others)
print(f"{sums.count(256)} places of 256, {sums.count(258)} of 258; the same on all ranks: {same}")
whole = mx.sum(mx.full((3,), 100, dtype=mx.uint8)).item()
print(f"uint8, 100 on each rank: all_sum {octet}, mx.sum {whole}")
nan = mx.max(mx.array([float("nan"), 1.0, 1.0])).item()
print(f"NaN, 1 and 1: all_max {largest}, mx.max {nan}")
assert sums.count(256) == 2000 and sums.count(258) == 1000 and same
assert octet == 44 and whole == 300 and largest == 1 and math.isnan(nan)
PYTHON
