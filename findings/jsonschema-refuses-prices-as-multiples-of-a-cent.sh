#!/usr/bin/env bash
# Version: jsonschema 4.26.0
# One would guess: {"multipleOf": 0.01} takes every price with two decimal places.
# What happens: The division is one of binary floats, and what is left of it counts. 19.99, 0.07 and 0.29 are refused, and
#   1,363 of the 10,000 prices below 100. When schema and price are both read with parse_float=Decimal, all are taken.
# Seen:
#     19.99 is a multiple of 0.01: False
#     prices from 0.00 to 99.99 that are refused: 1363
#     with Decimal: 0
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check jsonschema==4.26.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json
from decimal import Decimal
from jsonschema import Draft202012Validator

schema, prices = '{"multipleOf": 0.01}', [f"{cents // 100}.{cents % 100:02}" for cents in range(10_000)]
floats = Draft202012Validator(json.loads(schema))
decimals = Draft202012Validator(json.loads(schema, parse_float=Decimal))
price = floats.is_valid(19.99)
refused = sum(not floats.is_valid(json.loads(text)) for text in prices)
exact = sum(not decimals.is_valid(json.loads(text, parse_float=Decimal)) for text in prices)
print("19.99 is a multiple of 0.01:", price)
print("prices from 0.00 to 99.99 that are refused:", refused)
print("with Decimal:", exact)
assert not price and refused == 1363 and exact == 0
PYTHON
