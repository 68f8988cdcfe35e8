#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU
# One would guess: An array can be computed on any thread, as torch's and numpy's can: a worker builds it and hands it over.
# What happens: What has not been evaluated belongs to the stream of the thread that wrote it down. Reading it on another one
#   raises, and when the worker has ended it is lost. Under asyncio.to_thread, or in a pool of several threads,
#   whether it works depends on which thread is free. A stream of mx.new_thread_unsafe_stream can be given away.
# Seen:
#     made by a worker, read here: There is no Stream(cpu, 0) in current thread.
#     evaluated by the worker, read here: [3.0, 3.0]
#     on a thread-unsafe stream: [3.0, 3.0]
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
from concurrent.futures import ThreadPoolExecutor
import mlx.core as mx

def made(evaluated=False, stream=None):
    value = mx.add(mx.ones((2,), stream=stream), 2, stream=stream)
    if evaluated:
        mx.eval(value)
    return value

def read(*options):
    with ThreadPoolExecutor(1) as pool:
        value = pool.submit(made, *options).result()
    try:
        return value.tolist()
    except RuntimeError as error:
        return str(error)

seen = [read(), read(True), read(False, mx.new_thread_unsafe_stream(mx.cpu))]
print(f"made by a worker, read here: {seen[0]}")
print(f"evaluated by the worker, read here: {seen[1]}")
print(f"on a thread-unsafe stream: {seen[2]}")
assert "in current thread" in seen[0] and seen[1] == seen[2] == [3.0, 3.0]
PYTHON
