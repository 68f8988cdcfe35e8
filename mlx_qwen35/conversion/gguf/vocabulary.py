"""The vocabulary of a GGUF file: tokens, merges, kinds of tokens, template, ends.

Knows tokenizer.json and its companions, and what llama.cpp makes of them. Knows no arrays. llama.cpp has the splitting
of text before the merges built in, under names: ours is "qwen35", and no file says it. It composes no characters (NFC)
before that, which this family's tokenizer does: a text with decomposed accents gets other ids there.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from mlx_qwen35.checkpoint.gguf.types import BOOL, CONTROL, I32, NORMAL, STRING, U32, UNUSED, USER_DEFINED
from mlx_qwen35.checkpoint.gguf.vocabulary import SPLITTING
from mlx_qwen35.conversion.gguf.metadata import Metadata, Value
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.text.tokenizer import TURN_END

_ELSE = "write an MLX folder instead, or take the tokenizer.json of the original checkpoint"

Read = Callable[[str], bytes | None]


def vocabulary(read: Read, vocab_size: int, config: Mapping[str, Any], where: str) -> Metadata:
    """tokenizer.*, for a model whose embeddings have `vocab_size` rows.

    read: a companion file's bytes by its name, None if there is none. config: config.json. where: names the source in
    errors. Raises CheckpointError if there is no tokenizer.json, or one that llama.cpp does not know.
    """
    tokenizer = _object(read, "tokenizer.json", where)
    if tokenizer is None:
        raise CheckpointError(f"{where} has no tokenizer.json, which a GGUF file holds: copy it from the original")
    try:
        _check_known(tokenizer, where)
        model, settings = tokenizer["model"], _object(read, "tokenizer_config.json", where) or {}
        added = _added(tokenizer, settings)
        tokens = _tokens(model["vocab"], added, vocab_size, where)
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{where}: tokenizer.json is damaged ({error!r:.80}): copy it again") from None
    ids = {token: number for number, (token, _) in enumerate(tokens)}
    found = {
        "tokenizer.ggml.model": Value(STRING, "gpt2"),
        "tokenizer.ggml.pre": Value(STRING, "qwen35"),
        "tokenizer.ggml.tokens": Value(STRING, [token for token, _ in tokens], many=True),
        "tokenizer.ggml.token_type": Value(I32, [kind for _, kind in tokens], many=True),
        "tokenizer.ggml.merges": Value(STRING, merges, many=True),
        "tokenizer.ggml.add_bos_token": Value(BOOL, False),
    }
    inner = config.get("text_config") or {}
    ends = {
        "eos": ids.get(_content(settings.get("eos_token")) or TURN_END),
        "bos": ids.get(_content(settings.get("bos_token"))),
        "padding": ids.get(_content(settings.get("pad_token"))),
    }
    for key, name in (("eos", "eos_token_id"), ("bos", "bos_token_id"), ("padding", "pad_token_id")):
        given = [ends[key], config.get(name), inner.get(name)]
        number = next((value for value in given if isinstance(value, int) and 0 <= value < vocab_size), None)
        if number is not None:
            found[f"tokenizer.ggml.{key}_token_id"] = Value(U32, number)
    template = _template(read, settings, where)
    return found if template is None else found | {"tokenizer.chat_template": Value(STRING, template)}


def _check_known(tokenizer: Mapping[str, Any], where: str) -> None:
    """Raises CheckpointError for a tokenizer that llama.cpp would take for this family's, and that splits otherwise."""
    steps = tokenizer["pre_tokenizer"]
    steps = steps.get("pretokenizers", [steps])
    patterns = [step["pattern"].get("Regex") for step in steps if step["type"] == "Split"]
    rest = [step for step in steps if step["type"] != "Split"]
    plain = len(rest) == 1 and rest[0]["type"] == "ByteLevel" and not rest[0].get("add_prefix_space")
    if tokenizer["model"].get("type", "BPE") != "BPE" or not plain or rest[0].get("use_regex"):
        raise CheckpointError(f"{where}: tokenizer.json is no byte-level BPE of this family: {_ELSE}")
    if patterns != [SPLITTING["qwen35"]]:
        raise CheckpointError(
            f"{where}: tokenizer.json splits a text by {str(patterns):.60}..., not as llama.cpp's qwen35 does: {_ELSE}"
        )


def _added(tokenizer: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[int, tuple[str, bool]]:
    """Added tokens by their ids: text, and whether they are special. Some stand in tokenizer_config.json only."""
    found = {int(number): token for number, token in (settings.get("added_tokens_decoder") or {}).items()}
    found |= {token["id"]: token for token in tokenizer.get("added_tokens") or ()}
    return {number: (token["content"], token.get("special") is True) for number, token in found.items()}


def _tokens(
    vocab: Mapping[str, int], added: Mapping[int, tuple[str, bool]], size: int, where: str
) -> list[tuple[str, int]]:
    """The text and kind of every id below `size`; ids without a token fill up to the rows of the embeddings."""
    most = max([*vocab.values(), *added])
    if most >= size:
        raise CheckpointError(
            f"{where}: tokenizer.json goes up to id {most} and the embeddings have {size} rows: take both from one "
            "checkpoint"
        )
    tokens = [(f"[PAD{number}]", UNUSED) for number in range(size)]
    for token, number in vocab.items():
        tokens[number] = token, NORMAL
    for number, (token, special) in added.items():
        looks = token.startswith("<|") and token.endswith("|>")  # llama.cpp's files have these so, special or not
        tokens[number] = token, CONTROL if special or looks else USER_DEFINED
    return tokens


def _template(read: Read, settings: Mapping[str, Any], where: str) -> str | None:
    """The chat template, found as the loader finds it; the first of several is the default one."""
    data = read("chat_template.jinja")
    if data is not None:
        return data.decode("utf-8", errors="replace")
    found = (_object(read, "chat_template.json", where) or {}).get("chat_template", settings.get("chat_template"))
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def _content(token: Any) -> str | None:
    """The text of a token of tokenizer_config.json."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _object(read: Read, name: str, where: str) -> dict[str, Any] | None:
    data = read(name)
    if data is None:
        return None
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where}: {name} is not valid JSON ({error}); download it again") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{where}: {name} holds no JSON object; download it again")
    return found
