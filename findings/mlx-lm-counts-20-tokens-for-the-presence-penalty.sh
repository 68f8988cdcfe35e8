#!/usr/bin/env bash
# Version: mlx-lm 0.32.2 with mlx 0.32.4
# One would guess: presence_penalty, which "corresponds to the OpenAI option with the same name", is taken off every token that the
#   answer has so far, as Qwen's advice for it (1.5) has in mind.
# What happens: It counts the last 20 tokens, whatever they are. A token of the answer 21 tokens ago is free again, and one of the
#   prompt is punished before the answer begins: the question's last words are what the answer may not say.
# Seen (off the logit of a token, presence_penalty 1.5, generate_step with a prompt of 40 tokens):
#     before the first token of the answer, in the last 20 of the prompt: 1.5
#     the same, in the first 20 of the prompt: 0.0
#     a token of the answer, 20 tokens ago: 1.5; 21 tokens ago: 0.0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache
from mlx_lm.sample_utils import make_logits_processors

SIZE, ANSWER = 100, 50
seen = []

class Counts:
    """Says the token behind the one it is given, whatever came before."""
    layers = [None]

    def __call__(self, tokens, cache=None, **_):
        cache[0].update_and_fetch(mx.zeros((1, 1, tokens.shape[1], 8)), mx.zeros((1, 1, tokens.shape[1], 8)))
        return 1000.0 * (mx.arange(SIZE) == tokens[..., None] + 1)

[penalty] = make_logits_processors(presence_penalty=1.5)

def watched(tokens, logits):
    before = mx.array(logits)
    seen.append(before - penalty(tokens, logits))
    return before

list(generate_step(mx.arange(40), Counts(), max_tokens=ANSWER - 1, prompt_cache=[KVCache()], logits_processors=[watched]))
off = [[row[0, token].item() for token in range(SIZE)] for row in seen]
late, early = off[0][30], off[0][5]
print(f"before the first token of the answer, in the last 20 of the prompt: {late}")
print(f"the same, in the first 20 of the prompt: {early}")
near, far = off[30][40 + 10], off[31][40 + 10]
print(f"a token of the answer, 20 tokens ago: {near}; 21 tokens ago: {far}")
assert (late, early, near, far) == (1.5, 0, 1.5, 0)
PYTHON
