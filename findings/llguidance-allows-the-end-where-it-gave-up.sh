#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: The mask allows the end of the text where the answer is complete. Where the matcher cannot go on (here for
#   a limit on its work), a mask raises, or allows nothing.
# What happens: It allows the end, and that alone: who only follows masks ends half an answer, as if it were whole. is_error()
#   has to be asked behind every mask.
# Seen:
#     behind {": only the end is allowed: True; is_accepting: False; is_error: True
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
from llguidance import JsonCompiler, LLMatcher, LLParserLimits, LLTokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

letters = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.add_special_tokens([AddedToken("<|im_end|>", normalized=False)])
end = tokenizer.token_to_id("<|im_end|>")
known = LLTokenizer(tokenizer.to_str(), eos_token=end)

matcher = LLMatcher(
    known, JsonCompiler().compile(json.dumps({"type": "object"})), log_level=0, limits=LLParserLimits(step_lexer_fuel=300)
)


def allowed():
    words = np.frombuffer(matcher.compute_bitmask(), np.uint32)
    return [token for token in range(known.vocab_size) if words[token // 32] >> np.uint32(token % 32) & 1]


for letter in "{\"":
    assert letters[letter] in allowed() and matcher.consume_token(letters[letter])
only = allowed() == [end]
print("behind {\": only the end is allowed:", only, end="; ")
print("is_accepting:", matcher.is_accepting(), end="; ")
print("is_error:", matcher.is_error())
assert only and not matcher.is_accepting() and matcher.is_error()
PYTHON
