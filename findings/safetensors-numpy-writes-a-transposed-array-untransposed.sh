#!/usr/bin/env bash
# Version: safetensors 0.8.0, numpy 2.4.6
# One would guess: safetensors.numpy.save_file writes the array it is given, or refuses one that is not contiguous, as
#   safetensors.torch does.
# What happens: It writes the bytes from where the array begins, under the array's shape. A transposed matrix comes back
#   with the rows of the original cut anew, a slice of columns with its neighbours' values, and nothing is said.
#   numpy.ascontiguousarray before is all it takes.
# Seen:
#     transposed: written [[0, 3], [1, 4], [2, 5]], read [[0, 1], [2, 3], [4, 5]]
#     two of three columns: written [[0, 1], [3, 4]], read [[0, 1], [2, 3]]
#     Fortran order: written [[0, 1, 2], [3, 4, 5]], read [[0, 3, 1], [4, 2, 5]]
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6
cd "$folder"
env/bin/python - <<'PYTHON'
import numpy as np
from safetensors.numpy import load_file, save_file

matrix = np.arange(6, dtype=np.int32).reshape(2, 3)
for name, array, seen in (
    ("transposed", matrix.T, [[0, 1], [2, 3], [4, 5]]),
    ("two of three columns", matrix[:, :2], [[0, 1], [2, 3]]),
    ("Fortran order", np.asfortranarray(matrix), [[0, 3, 1], [4, 2, 5]]),
):
    save_file({"w": array}, "w.safetensors")
    read = load_file("w.safetensors")["w"].tolist()
    print(f"{name}: written {array.tolist()}, read {read}")
    assert read == seen != array.tolist()
save_file({"w": np.ascontiguousarray(matrix.T)}, "w.safetensors")
assert load_file("w.safetensors")["w"].tolist() == matrix.T.tolist()
PYTHON
