#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: {"const": 9007199254740993} lets that number be written and no other: the texts of schema and answer are the
#   same digits. So do the bounds of an integer.
# What happens: Numbers of a schema are read as doubles. The only answer that can come is another number, with nothing said:
#   an id of 19 digits, as many services give out, loses its last two or three. A minimum lets the number below it in.
# Seen:
#     const 9007199254740993: itself False, 9007199254740992 True
#     const 1234567890123456789: itself False, 1234567890123456768 True
#     minimum 9007199254740993: 9007199254740992 True
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
tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
known = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))

def takes(grammar, text):
    matcher, tokens = LLMatcher(known, grammar), tokenizer.encode(text).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

def fits(schema, number):
    return takes(JsonCompiler().compile(json.dumps(schema)), str(number))

for number, other in ((9007199254740993, 9007199254740992), (1234567890123456789, 1234567890123456768)):
    own, wrong = (fits({"const": number}, each) for each in (number, other))
    print(f"const {number}: itself {own}, {other} {wrong}")
    assert not own and wrong
below = fits({"type": "integer", "minimum": 9007199254740993}, 9007199254740992)
print("minimum 9007199254740993: 9007199254740992", below)
assert below and fits({"const": 12345}, 12345) and not fits({"const": 12345}, 12344)
PYTHON
