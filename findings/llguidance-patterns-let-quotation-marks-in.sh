#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: A pattern is about the string that is meant: with "^[^\"]*$" no quotation mark comes into it, and with a
#   backslash in the class no backslash.
# What happens: A class that admits the control characters, as [^...] mostly does, lets all short escapes through, those of the
#   quotation mark and the backslash too. The answer "a\"b" passes, and its value does not match. Without U+0008 in
#   the class it is right.
# Seen:
#     ^[^"]*$ lets "a\"b" pass: True; its value matches: False
#     ^[^\\]*$ lets "a\\b" pass: True; its value matches: False
#     ^[^"\x08]*$ lets "a\"b" pass: False; its value matches: False
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
cd "$folder"
env/bin/python - <<'PYTHON'
import json
import re

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

found = []
for pattern, text in (('^[^"]*$', r'"a\"b"'), (r"^[^\\]*$", r'"a\\b"'), (r'^[^"\x08]*$', r'"a\"b"')):
    passes = takes(JsonCompiler().compile(json.dumps({"type": "string", "pattern": pattern})), text)
    matches = re.search(pattern, json.loads(text)) is not None
    print(f"{pattern} lets {text} pass: {passes}; its value matches: {matches}")
    found.append((passes, matches))
assert found == [(True, False), (True, False), (False, False)]
PYTHON
