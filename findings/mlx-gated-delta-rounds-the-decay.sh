#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: mx.fast.gated_delta_update(q, k, v, gamma, beta, state) with gamma and state in float32 decays the state in
#   float32, whatever q is.
# What happens: gamma is rounded to the dtype of q first. In bfloat16 0.999 is 1: a state that should fade stays for ever.
# Seen:
#     q in bfloat16, two tokens with a decay of 0.999: 1.0
#     q in float32, the same: 0.99800
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import mlx.core as mx

def state(dtype):
    q = mx.ones((1, 2, 1, 64), dtype)
    nothing = mx.zeros_like(q)
    decay, beta = mx.full((1, 2, 1), 0.999), mx.zeros((1, 2, 1))
    return mx.fast.gated_delta_update(q, nothing, nothing, decay, beta, mx.ones((1, 1, 64, 64)))[1][0, 0, 0, 0].item()

half, full = state(mx.bfloat16), state(mx.float32)
print(f"q in bfloat16, two tokens with a decay of 0.999: {half}")
print(f"q in float32, the same: {full:.5f}")
assert half == 1.0 and abs(full - 0.999**2) < 1e-5
PYTHON
