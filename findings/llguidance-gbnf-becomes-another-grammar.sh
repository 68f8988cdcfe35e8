#!/usr/bin/env bash
# Version: llguidance 1.9.1, llguidance.gbnf_to_lark
# One would guess: any_to_lark, which the package has for grammars of llama.cpp, gives a grammar of the same texts, or raises.
# What happens: The point, which is any character in GBNF, becomes one that stops at a line's end; a set with && in it becomes
#   an intersection, which is empty; an escape \u00e9 is shortened to \ue9, which the grammar's own reader refuses.
# Seen:
#     root ::= .+ takes two lines: False
#     root ::= [a&&b] takes a, &, b: False, False, False
#     root ::= "\u00e9" -> "\ue9": refused
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check llguidance==1.9.1 tokenizers==0.23.3
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
known = LLTokenizer(tokenizer.to_str(), eos_token=tokenizer.token_to_id("<|im_end|>"))

def takes(grammar, text):
    matcher, tokens = LLMatcher(known, grammar), tokenizer.encode(text).ids
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

def grammar(gbnf):
    return LLMatcher.grammar_from_lark(any_to_lark(gbnf))

lines = takes(grammar("root ::= .+"), "a\nb")
print("root ::= .+ takes two lines:", lines)
each = [takes(grammar("root ::= [a&&b]"), letter) for letter in "a&b"]
print("root ::= [a&&b] takes a, &, b:", ", ".join(map(str, each)))
lark = any_to_lark(r'root ::= "\u00e9"').split("start: ")[1].strip()
refused = LLMatcher.validate_grammar(grammar(r'root ::= "\u00e9"'), known) != ""
print(rf'root ::= "\u00e9" -> {lark}: {"refused" if refused else "taken"}')
assert takes(grammar("root ::= .+"), "ab") and not lines and not any(each) and lark == r'"\ue9"' and refused
PYTHON
