#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: A schema that says uniqueItems: false says nothing, as the standard has it, and is taken; so does a format
#   that is not known, which is a mere remark.
# What happens: Both are refused, uniqueItems for its name and the format for not being known. Schemas that code generators
#   and pydantic write have both.
# Seen:
#     uniqueItems false: Unimplemented keys: ["uniqueItems"]
#     format path: Unknown format: path
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
cd "$folder"
env/bin/python - <<'PYTHON'
import json

from llguidance import JsonCompiler, LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])

known = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))

def refused(schema):
    try:
        return LLMatcher.validate_grammar(JsonCompiler().compile(json.dumps(schema)), known)
    except ValueError as error:
        return str(error)

off = refused({"type": "array", "items": {"type": "integer"}, "uniqueItems": False})
path = refused({"type": "string", "format": "path"})
print("uniqueItems false:", off)
print("format path:", path)
assert "uniqueItems" in off and "path" in path and refused({"type": "string", "format": "email"}) == ""
PYTHON
