#!/usr/bin/env bash
# Version: mlx-lm 0.32.2 with mlx 0.32.4
# One would guess: The cache that a batch hands out for one of its rows, and that a prompt cache keeps under a limit of bytes,
#   takes the nbytes that it says.
# What happens: ArraysCache.extract gives a slice, and a slice in MLX keeps the array that it is of. One row of eight counts as an
#   eighth and holds all eight; evaluating or deep-copying it, as the prompt cache does, changes nothing.
# Seen:
#     nbytes of the row: 4 MiB
#     memory held when the batch is gone: 32 MiB
#     after mx.contiguous, the row alone: 4 MiB
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import copy
import gc
import mlx.core as mx
from mlx_lm.models.cache import ArraysCache

batch = ArraysCache(1)
batch[0] = mx.zeros((8, 1024, 1024))
mx.eval(batch[0])
row = copy.deepcopy(batch.extract(0))
mx.eval(row[0])
del batch
gc.collect()
held = mx.get_active_memory() >> 20
print(f"nbytes of the row: {row.nbytes >> 20} MiB")
print(f"memory held when the batch is gone: {held} MiB")
row[0] = mx.contiguous(row[0])
mx.eval(row[0])
gc.collect()
alone = mx.get_active_memory() >> 20
print(f"after mx.contiguous, the row alone: {alone} MiB")
assert (row.nbytes >> 20, held, alone) == (4, 32, 4)
PYTHON
