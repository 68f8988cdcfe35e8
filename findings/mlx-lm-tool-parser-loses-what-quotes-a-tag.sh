#!/usr/bin/env bash
# Version: mlx-lm 0.32.2, tool_parsers.qwen3_coder
# One would guess: A call that writes a file about tool calls gives the file's text; two functions in one block give two calls,
#   or an error.
# What happens: A value ends at the first </parameter> in it, and what follows is dropped without a word. Of two functions the
#   first call is lost. A string parameter whose text is null becomes None.
# Seen:
#     written: close with </parameter> here -> read: 'close with '
#     two functions, a.txt and b.txt -> read: {'name': 'save', 'arguments': {'path': 'b.txt'}}
#     a string, null -> read: None
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check mlx-lm==0.32.2 'mlx==0.32.4' 'mlx[cpu]==0.32.4; sys_platform == "linux"'
cd "$folder"
env/bin/python - <<'PYTHON'
from mlx_lm.tool_parsers.qwen3_coder import parse_tool_call

names = {"path": {"type": "string"}, "text": {"type": "string"}}
tools = [{"type": "function", "function": {"name": "save", "parameters": {"type": "object", "properties": names}}}]

def written(key, value):
    return f"<function=save>\n<parameter={key}>\n{value}\n</parameter>\n</function>"

quoted = parse_tool_call(written("text", "close with </parameter> here"), tools)["arguments"]["text"]
print(f"written: close with </parameter> here -> read: {quoted!r}")
two = parse_tool_call(written("path", "a.txt") + "\n" + written("path", "b.txt"), tools)
print(f"two functions, a.txt and b.txt -> read: {two}")
null = parse_tool_call(written("text", "null"), tools)["arguments"]["text"]
print(f"a string, null -> read: {null}")
assert quoted == "close with " and two["arguments"] == {"path": "b.txt"} and null is None
PYTHON
