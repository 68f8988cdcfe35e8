#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: The constant of a schema is what is answered, or is refused where it cannot be.
# What happens: A whole number beyond 2**53 is taken for the double next to it: the constant cannot be written, its neighbour
#   must be, without a word. Identifiers of 64 bits are such numbers.
# Seen:
#     9007199254740993: taken False
#     9007199254740992: taken True
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 numpy
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
end = tokenizer.token_to_id("<|im_end|>")
known = LLTokenizer(tokenizer.to_str(), eos_token=end)

def taken(grammar, text):
    """How much of a text is taken, and whether it could end there."""
    matcher = LLMatcher(known, grammar)
    count = matcher.try_consume_tokens(tokenizer.encode(text).ids)
    return text[:count], matcher.is_accepting()


grammar = JsonCompiler().compile(json.dumps({"const": 9007199254740993}))
seen = []
for text in ("9007199254740993", "9007199254740992"):
    seen.append(taken(grammar, text) == (text, True))
    print(f"{text}: taken {seen[-1]}")
assert seen == [False, True]
PYTHON
