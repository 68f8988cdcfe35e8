#!/usr/bin/env bash
# Version: mlx-lm 0.32.2
# One would guess: mlx-lm, which runs Qwen3.5, loads the text model of it as transformers 5 saves it, with model_type
#   qwen3_5_text in a flat config.json.
# What happens: It knows qwen3_5 alone, and refuses the file by its type before a weight is read. The sizes in it are the
#   same.
# Seen:
#     qwen3_5_text: Model type qwen3_5_text not supported.
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import json
from pathlib import Path
import mlx.core as mx
from mlx_lm.utils import load_model

mx.save_safetensors("model.safetensors", {"a": mx.zeros((1,))})
Path("config.json").write_text(json.dumps({"model_type": "qwen3_5_text", "architectures": ["Qwen3_5ForCausalLM"]}))
try:
    load_model(Path("."))
    raise SystemExit("it was loaded")
except ValueError as error:
    print(f"qwen3_5_text: {error}")
    assert "not supported" in str(error)
PYTHON
