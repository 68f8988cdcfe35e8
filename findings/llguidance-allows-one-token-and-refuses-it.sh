#!/usr/bin/env bash
# Version: llguidance 1.9.1 with tokenizers 0.23.3
# One would guess: A token that the mask allows can be consumed: a constant in a schema can always be written.
# What happens: Where the constant spells an added token of the tokenizer, the mask allows that token alone, and consuming it
#   is refused: generation cannot go on. The letters of it, which would do, are not allowed.
# Seen:
#     allowed behind the opening quote and a: ['<think>']
#     consumed: False
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 numpy
cd "$folder"
env/bin/python - <<'PYTHON'
import json
import numpy as np
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from llguidance import JsonCompiler, LLMatcher, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])

known = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))
matcher = LLMatcher(known, JsonCompiler().compile(json.dumps({"const": "a<think>b"})))
for letter in '"a':
    assert matcher.consume_token(tokenizer.token_to_id(letter))
mask = allocate_token_bitmask(1, known.vocab_size)
fill_next_token_bitmask(matcher, mask, 0)
allowed = [token for token in range(known.vocab_size) if mask[0, token // 32] >> np.int32(token % 32) & 1]
print("allowed behind the opening quote and a:", [tokenizer.id_to_token(token) for token in allowed])
taken = matcher.consume_token(allowed[0])
print("consumed:", taken)
assert [tokenizer.id_to_token(token) for token in allowed] == ["<think>"] and not taken
PYTHON
