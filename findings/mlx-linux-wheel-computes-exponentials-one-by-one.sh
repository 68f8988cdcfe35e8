#!/usr/bin/env bash
# Version: mlx 0.32.4 with mlx[cpu], Linux, x86-64; numpy 2.4.6
# One would guess: mx.exp of a million float32 takes about as long as np.exp, which takes eight or sixteen at a time; MLX's source has
#   forms for AVX2 and AVX-512.
# What happens: The wheel takes them one by one, 10 to 20 times as long. So do sigmoid and softmax, of which exponentials are nearly
#   all of the time: in a prompt on such a machine, half of what attention over a few thousand tokens takes. Additions and products
#   are as fast as NumPy's. (Not so on Macs, where MLX calls Apple's vector functions.)
# Seen (an Intel Xeon with AVX-512, least of 20):
#     a million values, ns each: mx.exp 14.3, np.exp 0.5; mx.softmax 28.0; mx.add 0.3, np.add 0.3
# Ends with 0 as long as mx.exp takes more than 4 times as long as np.exp.
set -euo pipefail
[ "$(uname -sm)" = "Linux x86_64" ] || { echo "this is about Linux on x86-64"; exit 1; }
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check numpy==2.4.6 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import time

import mlx.core as mx
import numpy as np

values = np.random.RandomState(0).normal(size=(1000, 1000)).astype(np.float32)
array, out = mx.array(values), np.empty_like(values)
mx.eval(array)


def least(work):
    times = []
    for _ in range(20):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times) * 1e9 / values.size


theirs = {"exp": least(lambda: np.exp(values, out=out)), "add": least(lambda: np.add(values, values, out=out))}
ours = {name: least(lambda make=make: mx.eval(make())) for name, make in
        {"exp": lambda: mx.exp(array), "softmax": lambda: mx.softmax(array, axis=-1), "add": lambda: array + array}.items()}
print(f"a million values, ns each: mx.exp {ours['exp']:.1f}, np.exp {theirs['exp']:.1f}; mx.softmax {ours['softmax']:.1f}; "
      f"mx.add {ours['add']:.1f}, np.add {theirs['add']:.1f}")
assert ours["exp"] > 4 * theirs["exp"] and ours["exp"] > 8 * ours["add"]
PYTHON
