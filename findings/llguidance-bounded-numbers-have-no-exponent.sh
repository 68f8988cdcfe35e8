#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: A number with a bound or a multiple is written as any other number, as long as it fits.
# What happens: With minimum, maximum or multipleOf there is no exponent, and no -0: 1e5 for a price from 0 on is refused, and
#   6.02e23 has to be spelled in 24 digits. With multipleOf 0.5 there is no zero at the end either: 10.5 passes,
#   10.50 does not.
# Seen:
#     number: 1e5 True, 10.50 True, -0 True
#     from 0 on: 1e5 False, 10.50 True, -0 False
#     multiple of 0.5: 1e5 False, 10.50 False, -0 True
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

texts = ("1e5", "10.50", "-0")
found = []
for name, more in (("number", {}), ("from 0 on", {"minimum": 0}), ("multiple of 0.5", {"multipleOf": 0.5})):
    grammar = JsonCompiler().compile(json.dumps({"type": "number", **more}))
    found.append([takes(grammar, text) for text in texts])
    print(f"{name}: " + ", ".join(f"{text} {fits}" for text, fits in zip(texts, found[-1])))
    assert takes(grammar, "10.5")
assert found == [[True] * 3, [False, True, False], [False, False, True]]
PYTHON
