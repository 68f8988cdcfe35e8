#!/usr/bin/env bash
# Version: mlx-lm 0.32.2 with mlx 0.32.4
# One would guess: generate_step(..., max_kv_size=64), and --max-kv-size, keep the cache of Qwen3.5 at 64 tokens, as its text says
#   ("Maximum size of the key-value cache. Old entries (except the first 4 tokens) will be overwritten."), or refuse.
# What happens: A model that makes its caches itself, as all hybrids do, is not told of the limit. The cache grows as without it,
#   and nothing is said.
# Seen (tokens kept by the attention layer after a prompt of 600 and 10 more):
#     Qwen3.5, max_kv_size 64: KVCache, 610 tokens
#     Qwen3, max_kv_size 64: RotatingKVCache, 64 tokens
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
from importlib import import_module
import mlx.core as mx
from mlx_lm.models import qwen3, qwen3_5

generate = import_module("mlx_lm.generate")
make = generate.make_prompt_cache

sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
             vocab_size=64, rms_norm_eps=1e-6, max_position_embeddings=1000, tie_word_embeddings=True)
rope = {"rope_theta": 1e4, "rope_type": "default", "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}
text = dict(sizes, model_type="qwen3_5", linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=32,
            linear_value_head_dim=32, linear_conv_kernel_dim=4, full_attention_interval=2, rope_parameters=rope)
seen = []
for name, model in (
    ("Qwen3.5", qwen3_5.Model(qwen3_5.ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))),
    ("Qwen3", qwen3.Model(qwen3.ModelArgs.from_dict(dict(sizes, model_type="qwen3", rope_theta=1e4)))),
):
    made = []
    generate.make_prompt_cache = lambda *given, **named: made.append(make(*given, **named)) or made[-1]
    list(generate.generate_step(mx.arange(600) % 64, model, max_tokens=10, max_kv_size=64))
    kept = made[0][-1]
    tokens = kept.size()
    seen.append((type(kept).__name__, tokens))
    print(f"{name}, max_kv_size 64: {seen[-1][0]}, {tokens} tokens")
assert seen[0][0] == "KVCache" and seen[0][1] > 600 and seen[1] == ("RotatingKVCache", 64)
PYTHON
