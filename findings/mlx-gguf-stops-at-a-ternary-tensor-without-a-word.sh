#!/usr/bin/env bash
# Version: mlx 0.32.4, gguf 0.19.0
# One would guess: mx.load of a GGUF gives all of its tensors, or raises for a type that it does not know, as it does for Q5_0.
# What happens: At the first tensor of TQ1_0, TQ2_0 or MXFP4 it ends, and returns what came before it. The tensors behind it,
#   of types that it reads, are missing too.
# Seen:
#     a (F32), b (TQ1_0), c (F32) -> ['a']
#     a (F32), b (MXFP4), c (F32) -> ['a']
#     a (F32), b (Q5_0), c (F32) -> [load_gguf] gguf_tensor_to_f16 failed
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import gguf
import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Type

x = np.random.RandomState(0).standard_normal((4, 256)).astype(np.float32)
found = {}
for kind in (Type.TQ1_0, Type.MXFP4, Type.Q5_0):
    file = gguf.GGUFWriter("x.gguf", "test")
    file.add_tensor("a", x)
    file.add_tensor("b", gguf.quants.quantize(x, kind), raw_dtype=kind)
    file.add_tensor("c", x)
    for write in (file.write_header_to_file, file.write_kv_data_to_file, file.write_tensors_to_file):
        write()
    file.close()
    try:
        found[kind] = sorted(mx.load("x.gguf"))
    except RuntimeError as error:
        found[kind] = str(error)
    print(f"a (F32), b ({kind.name}), c (F32) -> {found[kind]}")
assert found[Type.TQ1_0] == found[Type.MXFP4] == ["a"] and "failed" in found[Type.Q5_0]
PYTHON
