#!/usr/bin/env bash
# Version: litellm 1.110.2
# One would guess: An import is local; what a program asks later goes to the server that it names.
# What happens: `import litellm` looks for a list of prices at raw.githubusercontent.com, whatever models will be used. Where there is
#   no network it tries again, waits, and goes on with the list in its package; LITELLM_LOCAL_MODEL_COST_MAP=True in the
#   environment keeps it from asking.
# Seen:
#     hosts that an import looks up: ['raw.githubusercontent.com']
#     with LITELLM_LOCAL_MODEL_COST_MAP=True: []
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check litellm==1.110.2
cd "$folder"
env/bin/python - <<'PYTHON'
import subprocess
import sys

PROGRAM = """
import socket

asked = set()


def refuse(host, *rest, **named):
    asked.add(host.decode() if isinstance(host, bytes) else host)
    raise socket.gaierror(-2, "Name or service not known")


socket.getaddrinfo = refuse
import litellm

print(sorted(asked))
"""


def hosts(**environment):
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment, timeout=300)
    return done.stdout.strip().splitlines()[-1]


alone, told = hosts(), hosts(LITELLM_LOCAL_MODEL_COST_MAP="True")
print("hosts that an import looks up:", alone)
print("with LITELLM_LOCAL_MODEL_COST_MAP=True:", told)
assert alone == "['raw.githubusercontent.com']" and told == "[]"
PYTHON
