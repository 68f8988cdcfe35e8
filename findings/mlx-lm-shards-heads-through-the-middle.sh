#!/usr/bin/env bash
# Version: mlx-lm 0.32.2 (models.qwen3_5), mlx 0.32.4
# One would guess: Model.shard, which cuts a model over the ranks of a group, refuses a number of ranks that its heads do not
#   divide into, with the number of heads: sizes that do not divide otherwise are refused so.
# What happens: With three key and value heads on two ranks the heads are cut through the middle. Nothing is said until the first
#   tokens go through, and then it is a norm that complains of a shape.
# Seen:
#     sharded over 2 ranks: 3 heads of 16 became 24 rows
#     at the first tokens: ValueError: [rms_norm] (*weight) must have the same size as the last dimension of x but has 16 elements.
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
from mlx_lm.models.qwen3_5 import Model, ModelArgs

mx.set_default_device(mx.cpu)


class Two:
    """What sharding asks of a group, for the first of two ranks; attention fails before any rank is spoken to."""

    def size(self):
        return 2

    def rank(self):
        return 0


text = {
    "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 6,
    "num_key_value_heads": 3, "head_dim": 16, "linear_num_key_heads": 2, "linear_num_value_heads": 2,
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "vocab_size": 96, "rms_norm_eps": 1e-6,
    "full_attention_interval": 1, "tie_word_embeddings": True,
}
model = Model(ModelArgs.from_dict({"model_type": "qwen3_5", "text_config": text}))
model.shard(Two())
rows = model.layers[0].self_attn.k_proj.weight.shape[0]
print(f"sharded over 2 ranks: 3 heads of 16 became {rows} rows")
assert rows == 24
try:
    mx.eval(model(mx.array([[1, 2, 3]])))
except ValueError as error:
    print(f"at the first tokens: ValueError: {error}")
    assert "[rms_norm]" in str(error), error
else:
    raise SystemExit("it went through")
PYTHON
