#!/usr/bin/env bash
# Version: prompt_toolkit 3.0.53
# One would guess: prompt("> ") writes these two characters, and a program that drives the terminal can wait for them.
# What happens: It writes the > and moves the cursor over the space. With a colour, the same label is written whole. A script
#   that expects "> " waits for ever on the plain one.
# Seen:
#     plain label: '> ' written: False
#     coloured label: '> ' written: True
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check prompt_toolkit==3.0.53
cd "$folder"
env/bin/python - <<'PYTHON'
import io
from prompt_toolkit import PromptSession
from prompt_toolkit.data_structures import Size
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output.vt100 import Vt100_Output

found = {}
for name, label in (("plain", "> "), ("coloured", [("ansigreen", "> ")])):
    out = io.StringIO()
    with create_pipe_input() as keys:
        keys.send_text("\r")
        PromptSession(input=keys, output=Vt100_Output(out, lambda: Size(24, 80))).prompt(label)
    found[name] = "> " in out.getvalue()
    print(f"{name} label: '> ' written: {found[name]}")
assert found == {"plain": False, "coloured": True}
PYTHON
