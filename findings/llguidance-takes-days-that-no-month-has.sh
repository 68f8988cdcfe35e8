#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: A string of the format date is a date, as the standard (RFC 3339) has it and validators check it.
# What happens: Each February has 29 days, and there is a year 0000. What was answered by the schema does not validate.
# Seen:
#     "2023-02-29": taken True, a date False
#     "0000-01-01": taken True, a date False
#     "2023-04-31": taken False, a date False
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 numpy
cd "$folder"
env/bin/python - <<'PYTHON'
import datetime
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


def is_date(text):
    try:
        return bool(datetime.date.fromisoformat(text))
    except ValueError:
        return False


grammar = JsonCompiler().compile(json.dumps({"type": "string", "format": "date"}))
seen = {}
for day in ("2023-02-29", "0000-01-01", "2023-04-31"):
    text = json.dumps(day)
    seen[day] = taken(grammar, text) == (text, True)
    print(f"{text}: taken {seen[day]}, a date {is_date(day)}")
    assert not is_date(day)
assert list(seen.values()) == [True, True, False]
PYTHON
