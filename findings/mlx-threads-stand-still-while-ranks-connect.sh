#!/usr/bin/env bash
# Version: mlx 0.32.4, CPU, ring
# One would guess: While mx.distributed.init waits for another rank, other threads of Python run: one may say how long it has waited,
#   watch over the other rank, or give up.
# What happens: It keeps Python's lock as long as it waits. No thread runs and no signal handler; where the other rank was lost, rank 0
#   waits on, and nothing inside of the process can end it. time.sleep in its place lets the thread run.
# Seen:
#     a thread that counts every 0.1 s, in 3 s of time.sleep: 30; in 3 s of mx.distributed.init: 1
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
cat > rank.py <<'PYTHON'
import sys, threading, time
import mlx.core as mx

count = 0
def tick():
    global count
    while True:
        count += 1
        time.sleep(0.1)

late = sys.argv[1] == "late"
threading.Thread(target=tick, daemon=True).start()
time.sleep(3)
slept, before, start = count, count, time.monotonic()
if late:
    time.sleep(3)
mx.distributed.init(strict=True, backend="ring")
print(slept, count - before, time.monotonic() - start)
PYTHON
env/bin/python - <<'PYTHON'
import json, os, socket, subprocess, sys

held = [socket.socket() for _ in range(2)]
for each in held:
    each.bind(("127.0.0.1", 0))
with open("hosts.json", "w") as file:
    json.dump([[f"127.0.0.1:{each.getsockname()[1]}"] for each in held], file)
for each in held:
    each.close()
ranks = [
    subprocess.Popen([sys.executable, "rank.py", when], stdout=subprocess.PIPE, text=True,
                     env={**os.environ, "MLX_HOSTFILE": "hosts.json", "MLX_RANK": rank})
    for rank, when in (("0", "early"), ("1", "late"))
]
slept, waited, seconds = (float(part) for part in ranks[0].communicate(timeout=60)[0].split())
ranks[1].communicate(timeout=60)
print(f"a thread that counts every 0.1 s, in 3 s of time.sleep: {slept:.0f}; in {seconds:.0f} s of mx.distributed.init: {waited:.0f}")
assert slept >= 20 and waited <= 2 and seconds > 2
PYTHON
