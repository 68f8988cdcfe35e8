#!/usr/bin/env bash
# Version: mlx 0.32.4
# One would guess: mlx.launch ends with an exit status that is not 0 when the program that it launched did on every rank: scripts
#   and CI can tell.
# What happens: It warns on standard error, and ends with 0.
# Seen:
#     both ranks ended with 3, mlx.launch with 0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
import subprocess
import sys

done = subprocess.run(
    ["env/bin/mlx.launch", "--backend", "ring", "-n", "2", sys.executable, "-c", "import sys; sys.exit(3)"],
    capture_output=True, text=True, timeout=100,
)
said = done.stderr + done.stdout
assert said.count("exited with code 3") == 2, said
print(f"both ranks ended with 3, mlx.launch with {done.returncode}")
assert done.returncode == 0
PYTHON
