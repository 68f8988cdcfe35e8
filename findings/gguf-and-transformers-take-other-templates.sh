#!/usr/bin/env bash
# Version: gguf 0.19.0, transformers 5.24.0
# One would guess: Of a folder with chat_template.jinja and a chat_template in tokenizer_config.json, a converted model gets
#   the template that the model had.
# What happens: transformers takes the file. gguf.SpecialVocab, by which llama.cpp's converter fills
#   tokenizer.chat_template, takes the entry of tokenizer_config.json. Whoever corrects the file of a checkpoint that has
#   both gets a GGUF with the old template, without a word. It takes the file only where there is no entry.
# Seen:
#     transformers: 'the file'
#     gguf: 'the entry'
#     gguf, without the entry: 'the file'
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check gguf==0.19.0 transformers==5.24.0
cd "$folder"
env/bin/python - <<'PYTHON'
import json
from pathlib import Path

import gguf
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

Path("model").mkdir()
Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])).save("model/tokenizer.json")
Path("model/chat_template.jinja").write_text("the file")
settings = {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "the entry"}
Path("model/tokenizer_config.json").write_text(json.dumps(settings))
one = AutoTokenizer.from_pretrained("model").chat_template
two = gguf.SpecialVocab("model").chat_template
del settings["chat_template"]
Path("model/tokenizer_config.json").write_text(json.dumps(settings))
three = gguf.SpecialVocab("model").chat_template
print(f"transformers: {one!r}\ngguf: {two!r}\ngguf, without the entry: {three!r}")
assert (one, two, three) == ("the file", "the entry", "the file")
PYTHON
