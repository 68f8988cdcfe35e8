#!/usr/bin/env bash
# Version: jsonschema 4.26.0
# One would guess: A pattern is an expression of ECMA-262, as the standard recommends: $ is the end, \d is 0 to 9, and \p{L} is a
#   letter.
# What happens: It is handed to Python's re. "^[0-9]+$" takes a number with a line's end behind it, \d takes Arabic-Indic digits,
#   and a schema with \p{L} or a named group is no valid schema: check_schema refuses it.
# Seen:
#     ^[0-9]+$ takes "1" and a line's end: True
#     ^\d$ takes U+0663: True
#     ^\p{L}$ is a pattern: False
#     ^(?<digit>1)$ is a pattern: False
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check jsonschema==4.26.0
cd "$folder"
env/bin/python - <<'PYTHON'
from jsonschema import Draft202012Validator as Validator
from jsonschema.exceptions import SchemaError

def valid(pattern):
    try:
        Validator.check_schema({"pattern": pattern}, format_checker=Validator.FORMAT_CHECKER)
    except SchemaError:
        return False
    return True

end = Validator({"pattern": "^[0-9]+$"}).is_valid("1\n")
digit = Validator({"pattern": r"^\d$"}).is_valid("\u0663")
print('^[0-9]+$ takes "1" and a line\'s end:', end)
print(r"^\d$ takes U+0663:", digit)
print(r"^\p{L}$ is a pattern:", valid(r"^\p{L}$"))
print(r"^(?<digit>1)$ is a pattern:", valid("^(?<digit>1)$"))
assert end and digit and valid("^a$") and not valid(r"^\p{L}$") and not valid("^(?<digit>1)$")
PYTHON
