#!/usr/bin/env bash
# Version: mlx-lm 0.32.2
# One would guess: temp and top_p of make_sampler mean what they do in transformers: the temperature first, then the tokens that
#   have top_p of what it made of the distribution.
# What happens: top_p (and min_p) cut the distribution of temperature 1, and the temperature comes last. A high temperature
#   never lets in a token that was cut, and a low one keeps more than top_p. The same settings give other answers.
# Seen:
#     probabilities 0.6, 0.3, 0.1, top_p 0.85, temp 5: of 500 draws the third came 0 times
#     what temp 5 makes of them: 0.389, 0.339, 0.272; top_p 0.85 has to keep 3 of them
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx
from mlx_lm.sample_utils import make_sampler

logs = mx.log(mx.array([[0.6, 0.3, 0.1]]))
mx.random.seed(0)
sampler = make_sampler(temp=5.0, top_p=0.85)
third = [sampler(logs).item() for _ in range(500)].count(2)
print(f"probabilities 0.6, 0.3, 0.1, top_p 0.85, temp 5: of 500 draws the third came {third} times")
warm = mx.softmax(logs[0] / 5).tolist()
kept = 1 + sum(sum(warm[:n]) < 0.85 for n in (1, 2))
print(f"what temp 5 makes of them: {', '.join(f'{p:.3f}' for p in warm)}; top_p 0.85 has to keep {kept} of them")
assert third == 0 and kept == 3
sampler = make_sampler(temp=5.0)
assert [sampler(logs).item() for _ in range(500)].count(2) > 50
PYTHON
