#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: A save that is refused, because safetensors of MLX have no float64, leaves the file that was there as it was.
# What happens: The file is opened, and emptied, before the dtypes are looked at. What was in it is gone.
# Seen:
#     before: 99 bytes
#     refused: [save_safetensors] received invalid dtype.
#     after: 0 bytes
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import os
import mlx.core as mx

mx.save_safetensors("weights.safetensors", {"a": mx.ones((4,))})
before = os.path.getsize("weights.safetensors")
print(f"before: {before} bytes")
try:
    mx.save_safetensors("weights.safetensors", {"a": mx.ones((4,), dtype=mx.float64, stream=mx.cpu)})
    raise SystemExit("it was not refused")
except RuntimeError as error:
    print(f"refused: {error}")
after = os.path.getsize("weights.safetensors")
print(f"after: {after} bytes")
assert before > 0 and after == 0
PYTHON
