#!/usr/bin/env bash
# Version: pydantic 2.14.4, with jsonschema 4.26.0
# One would guess: An answer that fits Model.model_json_schema() is one that Model takes: an engine that holds answers to the
#   schema hands over objects that can be read.
# What happens: Some types lose what they are. Decimal is a number or any string, whatever digits it may have; a dict with keys
#   of int has any keys; complex is any string. A form made of the schema lets a model write all of these.
# Seen:
#     {'price': 'hello'}: fits the schema, the model refuses it (decimal_parsing)
#     {'price': 12345.678}: fits the schema, the model refuses it (decimal_max_digits)
#     {'price': 1, 'rows': {'x': 'y'}}: fits the schema, the model refuses it (int_parsing)
#     {'price': 1, 'root': 'hello'}: fits the schema, the model refuses it (complex_str_parsing)
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check pydantic==2.14.4 jsonschema==4.26.0
cd "$folder"
env/bin/python - <<'PYTHON'
import decimal
import json
from typing import Annotated
import jsonschema
import pydantic

class Model(pydantic.BaseModel):
    price: Annotated[decimal.Decimal, pydantic.Field(max_digits=5, decimal_places=2)]
    rows: dict[int, str] = {}
    root: complex = 0j

schema = jsonschema.Draft202012Validator(Model.model_json_schema())
for answer in ({"price": "hello"}, {"price": 12345.678}, {"price": 1, "rows": {"x": "y"}}, {"price": 1, "root": "hello"}):
    assert schema.is_valid(answer)
    try:
        Model.model_validate_json(json.dumps(answer))
        raise SystemExit(f"the model takes {answer}")
    except pydantic.ValidationError as error:
        print(f"{answer}: fits the schema, the model refuses it ({error.errors()[0]['type']})")
Model.model_validate_json('{"price": "19.99", "rows": {"1": "a"}, "root": "1+2j"}')
PYTHON
