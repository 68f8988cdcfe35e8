#!/usr/bin/env bash
# Version: safetensors 0.8.0, numpy 2.4.6, ml_dtypes 0.6.0
# One would guess: Whether safetensors.numpy reads a bfloat16 file depends on the file: it does, or says that numpy has none.
# What happens: It depends on what was imported before. The name goes to numpy as a text, and numpy knows it once ml_dtypes is
#   imported, by whomever (jax, or a library that needs it). Before that the whole file is refused, the float32 tensors
#   in it too. float8 is another way, by an attribute of numpy that there never is: a file that save_file has written
#   cannot be read back.
# Seen:
#     bfloat16 and float32, first: TypeError: data type 'bfloat16' not understood
#     after import ml_dtypes: bfloat16, float32
#     float8_e4m3fn, after import ml_dtypes: saved, and read: AttributeError
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check safetensors==0.8.0 numpy==2.4.6 ml_dtypes==0.6.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json, struct
import numpy as np
from safetensors.numpy import load_file, save_file

header = {"a": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}, "b": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}
text = json.dumps(header).encode()
with open("x.safetensors", "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text + bytes(8))

def told(path):
    try:
        return ", ".join(str(array.dtype) for _, array in sorted(load_file(path).items()))
    except (AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"

first = told("x.safetensors")
print("bfloat16 and float32, first:", first)
import ml_dtypes

second = told("x.safetensors")
print("after import ml_dtypes:", second)
save_file({"w": np.ones(2, ml_dtypes.float8_e4m3fn)}, "y.safetensors")
third = told("y.safetensors").split(":")[0]
print("float8_e4m3fn, after import ml_dtypes: saved, and read:", third)
assert first.startswith("TypeError") and second == "bfloat16, float32" and third == "AttributeError"
PYTHON
