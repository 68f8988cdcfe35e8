#!/usr/bin/env bash
# Version: numpy 2.4.6, with the OpenBLAS of its wheel, whose kernels for Haswell are asked for (x86-64 with AVX2), one thread
# One would guess: Either each column of W @ X has bits of its own, or these depend on how many columns X has. How many rows W has, by
#   which a sum over 32 products is not longer, does not come into it.
# What happens: Eight columns at once have the bits that they have two by two if W has 48 or 960 rows, and others with 100 or 1,024. Up
#   to seven columns always agree. (48 and 960 are multiples of 24, by which rows seem to
#   be taken; what is left over then is another kernel's.) So "a batch of 8 has the bits of single rows" may be found true in a test and be false for the next matrix.
# Seen: the largest number of columns that go together with their bits, of 2 to 12
#     rows of W 48: 12
#     rows of W 960: 12
#     rows of W 100: 7
#     rows of W 1024: 7
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6
cd "$folder"
OPENBLAS_CORETYPE=Haswell OPENBLAS_NUM_THREADS=1 env/bin/python - <<'PYTHON'
import numpy as np

rng = np.random.default_rng(0)
seen = {}
for rows in (48, 960, 100, 1024):
    w, x = rng.standard_normal((rows, 32), np.float32), rng.standard_normal((32, 12), np.float32)
    by_two = np.concatenate([w @ x[:, at : at + 2] for at in range(0, 12, 2)], axis=1)
    np.testing.assert_allclose(w @ x, by_two, atol=1e-4)
    same = [np.array_equal(w @ x[:, :count], by_two[:, :count]) for count in range(2, 13)]
    seen[rows] = 1 + (same.index(False) if False in same else len(same))
    print(f"rows of W {rows}: {seen[rows]}")
assert seen == {48: 12, 960: 12, 100: 7, 1024: 7}
PYTHON
