#!/usr/bin/env bash
# Version: mlx-lm 0.32.2
# One would guess: LRUPromptCache gives a request what it has in common with one that came before: 1,000 tokens of instructions
#   are computed once, whatever the question behind them is.
# What happens: It shortens the kept cache to the common part, and a cache with a recurrent state (ArraysCache, as Qwen3.5 and
#   other hybrids have) cannot be shortened. One layer of the kind, and nothing at all is used; not even the same
#   prompt without its last token. Only a prompt that goes on from the whole of an older one finds it.
# Seen (tokens left to compute of 1,010):
#     attention alone: other question 10, one token less 1, going on 5
#     with a recurrent layer: other question 1010, one token less 1009, going on 5
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
from mlx_lm.models.cache import ArraysCache, KVCache, LRUPromptCache

def attention(length):
    cache = KVCache()
    cache.update_and_fetch(mx.zeros((1, 1, length, 4)), mx.zeros((1, 1, length, 4)))
    return cache

def recurrent():
    cache = ArraysCache(1)
    cache[0] = mx.zeros((1, 4))
    return cache

shared, question, other = list(range(1000)), [1] * 10, [2] * 10
found = []
for name, caches in (("attention alone", [attention(1010)]), ("with a recurrent layer", [attention(1010), recurrent()])):
    store = LRUPromptCache()
    store.insert_cache("model", shared + question, caches)
    prompts = (shared + other, shared + question[:-1], shared + question + [3] * 5)
    left = [len(store.fetch_nearest_cache("model", prompt)[1]) for prompt in prompts]
    print(f"{name}: other question {left[0]}, one token less {left[1]}, going on {left[2]}")
    found.append(left)
assert found == [[10, 1, 5], [1010, 1009, 5]]
PYTHON
