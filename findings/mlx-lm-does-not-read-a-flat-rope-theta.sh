#!/usr/bin/env bash
# Version: mlx-lm 0.32.2 (models.qwen3_5), transformers 5.24.0
# One would guess: rope_theta beside the other sizes of a Qwen3.5 text config, where most models had it for years and where
#   transformers takes it, is the base of the rotary positions. mlx-lm's own arguments have a field of the name.
# What happens: The field is overwritten by what is in rope_parameters, or, where nothing is, by 100,000. The model runs, with
#   other positions, and nothing is said. partial_rotary_factor goes the same way.
# Seen:
#     rope_theta 10000000.0, partial_rotary_factor 0.5
#     transformers: 10000000.0, 0.5
#     mlx-lm: 100000, 0.25
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 transformers==5.24.0 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
from mlx_lm.models.qwen3_5 import TextModelArgs
from transformers import Qwen3_5TextConfig

flat = {"rope_theta": 1e7, "partial_rotary_factor": 0.5}
print(f"rope_theta {flat['rope_theta']}, partial_rotary_factor {flat['partial_rotary_factor']}")
rope = Qwen3_5TextConfig(**flat).rope_parameters
print(f"transformers: {rope['rope_theta']}, {rope['partial_rotary_factor']}")
args = TextModelArgs.from_dict({"model_type": "qwen3_5", **flat})
print(f"mlx-lm: {args.rope_theta}, {args.partial_rotary_factor}")
assert (rope["rope_theta"], rope["partial_rotary_factor"]) == (1e7, 0.5)
assert (args.rope_theta, args.partial_rotary_factor) == (100_000, 0.25)
PYTHON
