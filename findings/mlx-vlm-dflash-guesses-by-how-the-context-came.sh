#!/usr/bin/env bash
# Version: mlx-vlm 0.7.10 with mlx 0.32.4
# One would guess: What a DFlash drafter guesses depends on the context that it was given, and on its sliding window, and not on the
#   pieces in which the context came: a block's rows see the last sliding_window - 1 positions of it.
# What happens: A piece of S positions leaves up to S - 1 more in sight than the window holds, for that block. Where blocks are causal a
#   mask hides those; but a window that has turned over gives its keys in the order of its buffer, and the mask counts by their place
#   there, so that it hides keys inside the window. Both change the logits.
# Seen (largest difference of a block's logits after 20 positions of context, window 12, between one piece and others):
#     causal False, 17 + 1 + 1 + 1: 0.0000
#     causal False, 17 + 3: 0.3200
#     causal True, 17 + 1 + 1 + 1: 0.9911
#     causal True, 17 + 3: 0.0000
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-vlm==0.7.10 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
import mlx.nn as nn
from mlx_vlm.speculative.drafters.qwen3_dflash import Model, ModelConfig

config = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
          "head_dim": 16, "vocab_size": 64, "rope_theta": 1e4, "block_size": 8, "layer_types": ["sliding_attention"],
          "sliding_window": 12}


def logits(causal, pieces):
    mx.random.seed(1)
    told = {"mask_token_id": 60, "target_layer_ids": [0], "causal": causal}
    drafter = Model(ModelConfig.from_dict({**config, "dflash_config": told}))
    drafter.embed_tokens, drafter.lm_head = nn.Embedding(64, 32), nn.Linear(32, 64, bias=False)
    context, cache, start = mx.random.normal((1, 20, 32)), drafter.make_cache(), 0
    for length in pieces:
        made = drafter(mx.array([[5, 60, 60, 60]]), context[:, start : start + length], cache)
        start += length
    return made


seen = {}
for causal in (False, True):
    whole = logits(causal, [20])
    for pieces in ([17, 1, 1, 1], [17, 3]):
        seen[causal, len(pieces)] = mx.abs(logits(causal, pieces) - whole).max().item()
        print(f"causal {causal}, {' + '.join(map(str, pieces))}: {seen[causal, len(pieces)]:.4f}")
assert max(seen[False, 4], seen[True, 2]) < 1e-4 and min(seen[False, 2], seen[True, 4]) > 0.1
PYTHON
