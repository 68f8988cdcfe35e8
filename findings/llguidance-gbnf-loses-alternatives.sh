#!/usr/bin/env bash
# Version: llguidance 1.9.1
# One would guess: gbnf_to_lark gives a grammar that takes the texts which the GBNF takes in llama.cpp.
# What happens: Texts of the GBNF become words of a lexer, which takes the longest one and never takes it back: where one
#   alternative begins as another goes on, the other is lost.
# Seen:
#     abcd: taken up to "abcd"
#     xyz!: taken up to "xyz!"
#     abc!: taken up to "abc"
#     abz!: taken up to "ab"
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3 numpy
cd "$folder"
env/bin/python - <<'PYTHON'
from llguidance import LLMatcher, LLTokenizer
from llguidance.gbnf_to_lark import any_to_lark
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


grammar = any_to_lark("root ::= \"abc\" \"d\" | [a-z]+ \"!\"")
seen = {}
for text in ("abcd", "xyz!", "abc!", "abz!"):  # llama.cpp takes all of them
    seen[text] = taken(grammar, text)[0]
    print(f"{text}: taken up to \"{seen[text]}\"")
assert seen == {"abcd": "abcd", "xyz!": "xyz!", "abc!": "abc", "abz!": "ab"}
PYTHON
