#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: mx.quantize in mode nvfp4, whose groups have 16 weights, takes a matrix if its rows are a multiple of 16 long.
# What happens: Whether it does depends on how many rows there are: the whole matrix has to come out as a multiple of 32. Four
#   rows of 80 are taken, three are not, and the error is one of reshape, with shapes that nobody gave.
# Seen:
#     (4, 80): taken, scales (4, 5)
#     (3, 80): [reshape] Cannot reshape array of size 240 into shape (7,4,8).
#     (1, 16): [reshape] Cannot reshape array of size 16 into shape (0,4,8).
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
for shape in ((4, 80), (3, 80), (1, 16)):
    try:
        found.append(f"taken, scales {mx.quantize(mx.zeros(shape), 16, 4, mode='nvfp4')[1].shape}")
    except ValueError as error:
        found.append(str(error))
    print(f"{shape}: {found[-1]}")
assert found[0].startswith("taken") and all("[reshape]" in text for text in found[1:])
PYTHON
