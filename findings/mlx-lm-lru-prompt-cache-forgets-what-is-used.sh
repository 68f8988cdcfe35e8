#!/usr/bin/env bash
# Version: mlx-lm 0.32.2
# One would guess: LRUPromptCache drops what was not used for longest; a prompt that is asked for again and again stays. One that
#   is larger than the limit is not kept, and costs nothing else.
# What happens: Fetching does not count as use: the oldest goes first, however often it was found. And a prompt above max_bytes is
#   put in, everything older is dropped to make room, and then it is dropped itself: the cache is empty.
# Seen:
#     room for 3, the first fetched after every insert: after 4 inserts the first is there: False
#     5 prompts, then one above the limit: 0 prompts
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
from mlx_lm.models.cache import KVCache, LRUPromptCache

def cache(length):
    made = KVCache()
    made.update_and_fetch(mx.zeros((1, 1, length, 256)), mx.zeros((1, 1, length, 256)))
    return [made]

def found(store, token):
    return store.fetch_nearest_cache("model", [token, 0, 1])[0] is not None

store = LRUPromptCache(max_size=3)
for token in range(4):
    store.insert_cache("model", [token, 0], cache(8))
    there = found(store, 0)
print("room for 3, the first fetched after every insert: after 4 inserts the first is there:", there)
assert not there and found(store, 1)
store = LRUPromptCache(max_bytes=3_000_000)
for token in range(5):
    store.insert_cache("model", [token, 0], cache(200))
assert len(store) == 5
store.insert_cache("model", [9, 0], cache(2000))
print(f"5 prompts, then one above the limit: {len(store)} prompts")
assert len(store) == 0
PYTHON
