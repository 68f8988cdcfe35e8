#!/usr/bin/env bash
# Version: trl 1.16.0 (chat_templates/qwen3_8.jinja, as shipped by Qwen) with jinja2 3.1.6
# One would guess: A chat template takes the words of OpenAI's reasoning_effort (none, minimal, low, medium, high), which clients
#   send, or leaves out what it does not know.
# What happens: It knows xhigh, medium and low. Every other word raises, high too. Without the variable it is xhigh, the most
#   there is; medium writes nothing at all into the prompt, so the plain model is not what one gets by saying
#   nothing.
# Seen:
#     raises: high, none, minimal, max
#     nothing said is as xhigh: True
#     medium writes no system message: True
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check jinja2==3.1.6
cd "$folder"
env/bin/python - <<'PYTHON'
import subprocess
import sys
import zipfile
from pathlib import Path
import jinja2

subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "trl==1.16.0"], check=True)
source = zipfile.ZipFile(next(Path().glob("trl-*.whl"))).read("trl/chat_templates/qwen3_8.jinja").decode()

def refuse(message):
    raise ValueError(message)

environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
environment.globals["raise_exception"] = refuse
template = environment.from_string(source)

def prompt(**variables):
    return template.render(messages=[{"role": "user", "content": "hi"}], add_generation_prompt=True, **variables)

raising = []
for word in ("high", "none", "minimal", "max"):
    try:
        prompt(reasoning_effort=word)
    except ValueError:
        raising.append(word)
print("raises:", ", ".join(raising))
same = prompt() == prompt(reasoning_effort="xhigh")
plain = "<|im_start|>system" not in prompt(reasoning_effort="medium")
print("nothing said is as xhigh:", same)
print("medium writes no system message:", plain)
assert raising == ["high", "none", "minimal", "max"] and same and plain
PYTHON
