"""Writes the text files of a tiny checkpoint: a byte-level BPE and a small chat template in the family's form."""

import json
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("Ġ", "t"), ("Ġt", "he"), ("Ċ", "Ċ")]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
PLAIN = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
LATE = ["<|audio_start|>", "<|audio_end|>"]  # only in tokenizer_config.json

TEMPLATE = """
{%- if not messages %}{{ raise_exception('No messages provided.') }}{% endif -%}
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- for tool in tools %}
        {{- tool | tojson }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.reasoning_content %}
        {{- '<think>\\n' + message.reasoning_content + '\\n</think>\\n\\n' }}
    {%- endif %}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content or [] %}
            {{- part.text }}
        {%- endfor %}
    {%- endif %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>\\n<function=' + (call.function or call).name + '>\\n' }}
        {%- for name, value in (call.function or call).arguments | items %}
            {{- '<parameter=' + name + '>\\n' }}
            {{- value | tojson if value is mapping or (value is sequence and value is not string) else value | string }}
            {{- '\\n</parameter>\\n' }}
        {%- endfor %}
        {{- '</function>\\n</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {{- '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}
{%- endif %}
"""


def tokenizer_json() -> dict[str, Any]:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(alphabet)}
    for left, right in MERGES:
        vocabulary[left + right] = len(vocabulary)
    rust = tokenizers.Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES))
    rust.normalizer = normalizers.NFC()
    rust.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    rust.decoder = decoders.ByteLevel()
    rust.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in SPECIAL])
    rust.add_tokens([tokenizers.AddedToken(token, normalized=False) for token in PLAIN])
    return json.loads(rust.to_str())


def tokenizer_config(tokenizer: dict[str, Any]) -> dict[str, Any]:
    added = {str(token["id"]): {k: v for k, v in token.items() if k != "id"} for token in tokenizer["added_tokens"]}
    first = max(map(int, added)) + 1
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added |= {str(first + i): {"content": token, **flags} for i, token in enumerate(LATE)}
    return {"added_tokens_decoder": added, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "bos_token": None}


def write_text_files(folder: Path, **replaced: Any) -> Path:
    """The files of a whole tokenizer folder. `replaced`: other contents for tokenizer, tokenizer_config (JSON values)
    or template (text); None leaves the file out."""
    tokenizer = tokenizer_json()
    contents = {"tokenizer": tokenizer, "tokenizer_config": tokenizer_config(tokenizer), "template": TEMPLATE}
    contents |= replaced
    for name, content in contents.items():
        if content is None:
            continue
        file = "chat_template.jinja" if name == "template" else f"{name}.json"
        text = content if name == "template" else json.dumps(content, ensure_ascii=False)
        (folder / file).write_text(text, encoding="utf-8", newline="")
    return folder
