#!/usr/bin/env bash
# Version: transformers 5.24.0, with trl 1.16.0 (chat_templates/qwen3_5_think.jinja, as shipped by Qwen)
# One would guess: With continue_final_message the model goes on where the message stops: after "def f():" and four spaces there,
#   and after "<think>" and half a thought inside that thought.
# What happens: The template trims: the spaces are gone, and the model indents as it likes. An open thought is none to it:
#   an empty, closed one comes first, and the model goes on in a second. A thought that is closed on one line raises.
#   continue_final_message="reasoning_content" is the way into a thought.
# Seen:
#     def f(): and four spaces: '<think>\n\n</think>\n\ndef f():'
#     an open thought: '<think>\n\n</think>\n\n<think>\nLet me see'
#     <think>abc</think>answer: ValueError
#     reasoning_content: '<think>\nLet me see'
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0 jinja2==3.1.6
cd "$folder"
env/bin/python - <<'PYTHON'
import subprocess
import sys
import zipfile
from pathlib import Path
from transformers.utils.chat_template_utils import render_jinja_template

subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "trl==1.16.0"], check=True)
template = zipfile.ZipFile(next(Path().glob("trl-*.whl"))).read("trl/chat_templates/qwen3_5_think.jinja").decode()

def end(field="content", **message):
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", **message}]
    text = render_jinja_template([chat], chat_template=template, continue_final_message=field)[0][0]
    return text.partition("<|im_start|>assistant\n")[2]

spaces = end(content="def f():\n    ")
thought = end(content="<think>\nLet me see")
inside = end("reasoning_content", content="", reasoning_content="Let me see")
print("def f(): and four spaces:", repr(spaces))
print("an open thought:", repr(thought))
try:
    end(content="<think>abc</think>answer")
    raise SystemExit("it is continued")
except ValueError:
    print("<think>abc</think>answer: ValueError")
print("reasoning_content:", repr(inside))
empty = "<think>\n\n</think>\n\n"
assert spaces == empty + "def f():" and thought == empty + "<think>\nLet me see" and inside == "<think>\nLet me see"
PYTHON
