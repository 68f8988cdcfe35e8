#!/usr/bin/env bash
# Version: jsonschema 4.26.0, without extras
# One would guess: A validator that is given its draft's FORMAT_CHECKER checks the formats of that draft, or raises for one that
#   it cannot check.
# What happens: It checks those that the standard library can tell. date-time, time, duration, uri and hostname wait for further
#   packages, and until then every string has them: the same answers pass here and fail where jsonschema[format] is
#   installed. date and ipv4 are checked.
# Seen:
#     "hello world" passes as: date-time, time, duration, uri, hostname, json-pointer
#     "hello world" fails as: date, ipv4, uuid, email
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check jsonschema==4.26.0
cd "$folder"
env/bin/python - <<'PYTHON'
from jsonschema import Draft202012Validator

def passes(form):
    validator = Draft202012Validator({"format": form}, format_checker=Draft202012Validator.FORMAT_CHECKER)
    return validator.is_valid("hello world")

unchecked = ("date-time", "time", "duration", "uri", "hostname", "json-pointer")
checked = ("date", "ipv4", "uuid", "email")
print('"hello world" passes as:', ", ".join(filter(passes, unchecked)))
print('"hello world" fails as:', ", ".join(form for form in checked if not passes(form)))
assert all(map(passes, unchecked)) and not any(map(passes, checked))
PYTHON
