#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: When a function under mx.compile raises, the call has failed, and that is all: the next request goes on.
# What happens: A function that draws is compiled with inputs and outputs=mx.random.state. If it raises while it is traced, for a
#   parameter that it checks itself, the tracer's arrays stay in that state: from then on nothing that draws without a key can
#   be evaluated on the thread, whoever draws. Functions compiled like that are part of mlx-lm's samplers, and a top_k beyond
#   the vocabulary is enough. mx.random.seed puts it right, at the price of the seed.
# Seen:
#     the call: ValueError: k is too large
#     another draw: RuntimeError: [eval] Attempting to eval an array without a primitive.
#     after mx.random.seed(0): drawn
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
from functools import partial
import mlx.core as mx

@partial(mx.compile, inputs=mx.random.state, outputs=mx.random.state)
def draw(logits, k):
    if k > logits.shape[-1]:
        raise ValueError("k is too large")
    return mx.random.categorical(mx.topk(logits, k))

def told(call):
    try:
        mx.eval(call())
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return "drawn"

logits = mx.zeros((4,))
first = told(lambda: draw(logits, 5))
print("the call:", first)
second = told(lambda: mx.random.uniform(shape=(2,)))
print("another draw:", second)
mx.random.seed(0)
third = told(lambda: mx.random.uniform(shape=(2,)))
print("after mx.random.seed(0):", third)
assert first.startswith("ValueError") and "without a primitive" in second and third == "drawn"
PYTHON
