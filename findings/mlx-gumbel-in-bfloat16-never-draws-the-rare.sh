#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: argmax(logits + mx.random.gumbel(shape, dtype=logits.dtype)) draws a token as mx.random.categorical(logits)
#   does; in bfloat16 with two or three digits less.
# What happens: The noise is made of uniform numbers in that dtype, of which the largest below one is 255/256: it ends at
#   5.53, and in float16 at 7.63. Whatever lies further below the best token is never drawn, however much of it
#   there is. mx.random.categorical makes its noise in float32 and is right.
# Seen (one logit of 0 and 999 of -9, which have 11.0 % together; 100,000 draws each):
#     float32: categorical 11.1 %, gumbel 11.0 %, the largest noise 16.6
#     float16: categorical 11.1 %, gumbel 1.0 %, the largest noise 7.6
#     bfloat16: categorical 11.1 %, gumbel 0.0 %, the largest noise 5.5
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

key, size, draws = mx.random.key(1), 1000, 100_000
logits = mx.full((size,), -9.0)
logits[0] = 0.0
seen = {}
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    given, rare, largest = logits.astype(dtype), 0, 0.0
    for part in mx.random.split(key, 50):
        noise = mx.random.gumbel((draws // 50, size), dtype=dtype, key=part)
        rare += mx.sum(mx.argmax(given + noise, axis=-1) != 0).item()
        largest = max(largest, noise.max().item())
    right = mx.sum(mx.random.categorical(given, num_samples=draws, key=key) != 0).item()
    name = str(dtype).removeprefix("mlx.core.")
    seen[name] = right / draws, rare / draws, largest
    print(f"{name}: categorical {right / draws:.1%}, gumbel {rare / draws:.1%}, the largest noise {largest:.1f}".replace("%", " %"))
assert all(abs(right - 0.11) < 0.01 for right, *_ in seen.values())
assert abs(seen["float32"][1] - 0.11) < 0.01 and seen["float16"][1] < 0.02 and seen["bfloat16"][1] == 0
assert seen["bfloat16"][2] < 5.6 and seen["float16"][2] < 7.7 and seen["float32"][2] > 12
PYTHON
