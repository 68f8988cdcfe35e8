#!/usr/bin/env bash
# Version: safetensors 0.8.0, torch 2.13.0
# One would guess: A file of 4-bit floats (F4) is read like any other: get_slice tells the shape of the tensor, and gives parts of
#   it.
# What happens: The file counts values, torch counts bytes of two: one tensor has two shapes, and which one is told depends on who
#   is asked. get_tensor halves the last size; slicing does not, and raises, for rows and for the whole alike. Programs that read
#   their share of a matrix by rows cannot read these.
# Seen:
#     written: torch.float4_e2m1fn_x2 (4, 8)
#     get_slice(...).get_shape(): [4, 16]
#     get_tensor: (4, 8)
#     rows 1 to 3 by get_slice: RuntimeError: shape '[4, 16]' is invalid for input of size 32
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 torch==2.13.0 numpy==2.4.6
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
from safetensors import safe_open
from safetensors.torch import save_file

weights = torch.arange(32, dtype=torch.uint8).reshape(4, 8).view(torch.float4_e2m1fn_x2)
save_file({"w": weights}, "w.safetensors")
with safe_open("w.safetensors", "pt") as file:
    part, whole = file.get_slice("w"), file.get_tensor("w")
    try:
        said = str(tuple(part[1:3].shape))
    except RuntimeError as error:
        said = f"RuntimeError: {error}"
print("written:", weights.dtype, tuple(weights.shape))
print("get_slice(...).get_shape():", part.get_shape())
print("get_tensor:", tuple(whole.shape))
print("rows 1 to 3 by get_slice:", said)
assert part.get_shape() == [4, 16] and whole.shape == (4, 8) and "is invalid for input" in said
PYTHON
