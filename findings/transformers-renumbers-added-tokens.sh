#!/usr/bin/env bash
# Version: transformers 5.24.0
# One would guess: Added tokens have the ids that tokenizer.json gives them; an entry of added_tokens_decoder in
#   tokenizer_config.json for one that it lacks adds that one, behind them.
# What happens: With tokenizer_class Qwen2Tokenizer, what added_tokens_decoder lists comes first, and takes the ids of the
#   others if it does not list all of them: the id that a model learned as <|endoftext|> is another token now, without a
#   warning. PreTrainedTokenizerFast does as one would guess.
# Seen:
#     tokenizer.json: <|endoftext|> 256, <|im_end|> 257
#     PreTrainedTokenizerFast, and <tts_pad> 258: <|endoftext|> 256, <|im_end|> 257, <tts_pad> 258
#     Qwen2Tokenizer, and <tts_pad> 258: <|endoftext|> 258, <|im_end|> 257, <tts_pad> 256
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check transformers==5.24.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer

NAMES = ("<|endoftext|>", "<|im_end|>", "<tts_pad>")
letters = sorted(pre_tokenizers.ByteLevel.alphabet())
rust = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
rust.pre_tokenizer, rust.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
rust.add_special_tokens([AddedToken(name, special=True) for name in NAMES[:2]])
print("tokenizer.json:", ", ".join(f"{name} {rust.token_to_id(name)}" for name in NAMES[:2]))
flags = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized"), False)
found = {}
for kind in ("PreTrainedTokenizerFast", "Qwen2Tokenizer"):
    Path(kind).mkdir()
    rust.save(f"{kind}/tokenizer.json")
    settings = {"tokenizer_class": kind, "eos_token": NAMES[1], "pad_token": NAMES[0],
                "added_tokens_decoder": {"258": {"content": NAMES[2], "special": True, **flags}}}
    Path(kind, "tokenizer_config.json").write_text(json.dumps(settings))
    found[kind] = AutoTokenizer.from_pretrained(kind).convert_tokens_to_ids(list(NAMES))
    ids = ", ".join(f"{name} {i}" for name, i in zip(NAMES, found[kind]))
    print(f"{kind}, and <tts_pad> 258: {ids}")
assert found["PreTrainedTokenizerFast"] == [256, 257, 258] and found["Qwen2Tokenizer"] == [258, 257, 256]
PYTHON
