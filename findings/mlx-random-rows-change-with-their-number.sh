#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: With the same key the first numbers are the same however many are drawn, as numpy's generators have it: one
#   more row in a batch does not change what the first row draws, nor do more keys from a split the first keys.
# What happens: Which bits a place gets depends on how many places there are. A row that draws a token alone draws another one
#   beside a second row, with the same key and logits; padding the vocabulary with tokens that are impossible
#   changes the draw; split(key, 2) is not the beginning of split(key, 4).
# Seen:
#     first of 1, 2, 3 and 6 rows: 87, 577, 83, 887
#     1,000 logits: 782, and with 24 of -inf behind them: 891
#     split in 2 begins split in 4: False
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

key = mx.random.key(1)
logits = mx.random.normal((6, 1000), key=mx.random.key(3))
rows = [mx.random.categorical(logits[:count], key=key)[0].item() for count in (1, 2, 3, 6)]
print("first of 1, 2, 3 and 6 rows:", ", ".join(map(str, rows)))
plain = mx.random.categorical(logits[0], key=key).item()
padded = mx.random.categorical(mx.concatenate([logits[0], mx.full((24,), -mx.inf)]), key=key).item()
print(f"1,000 logits: {plain}, and with 24 of -inf behind them: {padded}")
begins = mx.array_equal(mx.random.split(key, 2), mx.random.split(key, 4)[:2]).item()
print("split in 2 begins split in 4:", begins)
assert len(set(rows)) == 4 and plain != padded and not begins
PYTHON
