#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: The attention_mask of a tokenizer, ones and zeros in an integer dtype, masks in
#   mx.fast.scaled_dot_product_attention as True and False do, or is refused, as torch refuses it.
# What happens: Everything that is not bool is added to the scores, integers too: a 1 raises a score by one and a 0 leaves it,
#   so nothing is hidden and nothing is said. And a row whose bool mask hides every key sees all of them alike: its output is
#   the mean of the values, those of the padding too. With -inf added it is NaN.
# Seen (one query, three keys of which the mask hides the last, whose value is 100):
#     bool mask: 1.5
#     the same in int32: 16.8
#     added by hand, scores + mask: 16.8
#     all keys hidden by bool: 34.3, the mean of the values 34.3
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

query, keys = mx.zeros((1, 1, 1, 8)), mx.zeros((1, 1, 3, 8))
values = mx.broadcast_to(mx.array([1.0, 2.0, 100.0])[:, None], (1, 1, 3, 8))

def attend(mask):
    return mx.fast.scaled_dot_product_attention(query, keys, values, scale=1.0, mask=mask)[0, 0, 0, 0].item()

mask = mx.array([[True, True, False]])
hidden, added = attend(mask), attend(mask.astype(mx.int32))
by_hand = (mx.softmax(mask.astype(mx.float32)) @ values[0, 0])[0, 0].item()
none, mean = attend(mx.zeros((1, 3), dtype=mx.bool_)), values.mean().item()
print(f"bool mask: {hidden:.1f}")
print(f"the same in int32: {added:.1f}")
print(f"added by hand, scores + mask: {by_hand:.1f}")
print(f"all keys hidden by bool: {none:.1f}, the mean of the values {mean:.1f}")
assert abs(hidden - 1.5) < 1e-3 and abs(added - by_hand) < 1e-3 and added > 10 and abs(none - mean) < 1e-3
PYTHON
