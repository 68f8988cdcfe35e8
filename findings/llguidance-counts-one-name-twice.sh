#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: An object with minProperties 2 has two properties when it is read.
# What happens: What is counted is pairs. One name written twice is two of them, and readers of JSON keep the last: a model that
#   repeats itself fills the form with one property.
# Seen:
#     {"a": 1, "a": 1} passes: True
#     read by json: {'a': 1}
#     {"a": 1} passes: False
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

schema = {"type": "object", "additionalProperties": {"type": "integer"}, "minProperties": 2}
grammar = JsonCompiler().compile(json.dumps(schema))
twice, once = '{"a": 1, "a": 1}', '{"a": 1}'
print(f"{twice} passes:", takes(grammar, twice))
print("read by json:", json.loads(twice))
print(f"{once} passes:", takes(grammar, once))
assert takes(grammar, twice) and not takes(grammar, once) and len(json.loads(twice)) == 1
PYTHON
