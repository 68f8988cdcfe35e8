"""The tokenizer in a GGUF's metadata as the tokenizer.json that it was made from, and the chat template beside it.

Knows what llama.cpp's converter drops and what follows from its name for the pre-tokenizer, "qwen35": the rule by
which text is split, and that text is brought into the composed form NFC first (which llama.cpp itself leaves out).
Knows no file format: gguf/container.py has read the arrays.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from mlx_qwen35.checkpoint.gguf.container import Array, Gguf
from mlx_qwen35.checkpoint.gguf.metadata import END_OF_TEXT, SPECIAL, TURN_END
from mlx_qwen35.checkpoint.gguf.types import CONTROL, NORMAL, STRING, USER_DEFINED
from mlx_qwen35.errors import CheckpointError

# How text is split before merges, by tokenizer.ggml.pre. The family's own rule: words with their marks, single digits,
# runs of punctuation, line ends, spaces.
SPLITTING = {
    "qwen35": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+"
    )
}
# Typed CONTROL, because they look like it, and not special in the family's tokenizer.
_NOT_SPECIAL = frozenset(
    f"<|{name}|>" for name in ("fim_prefix", "fim_middle", "fim_suffix", "fim_pad", "repo_name", "file_sep")
)


class Vocabulary:
    """Of one GGUF; what it has to take apart it takes apart once."""

    def __init__(self, gguf: Gguf):
        self.gguf = gguf

    @property
    def _where(self) -> str:
        return str(self.gguf.path)

    def _array(self, key: str, kind: int | None = None) -> list[Any]:
        value = self.gguf.metadata.get(f"tokenizer.ggml.{key}")
        if not isinstance(value, Array) or (kind is not None and value.kind != kind):
            raise CheckpointError(
                f"{self._where}: tokenizer.ggml.{key} is missing or no list: take a GGUF that has its tokenizer"
            )
        return value.values()

    @cached_property
    def tokens(self) -> list[str]:
        """By their ids, padding up to the size of the embedding included."""
        return self._array("tokens", STRING)

    @cached_property
    def kinds(self) -> list[int]:
        found = self._array("token_type")
        if len(found) != len(self.tokens):
            raise CheckpointError(
                f"{self._where}: tokenizer.ggml.token_type has {len(found)} entries for {len(self.tokens)} tokens: "
                "download the file again"
            )
        return found

    @cached_property
    def named(self) -> dict[str, int]:
        """The ids of the tokens that config.json names, by their text; {} without a vocabulary."""
        if not isinstance(self.gguf.metadata.get("tokenizer.ggml.tokens"), Array):
            return {}
        wanted = {*SPECIAL.values(), END_OF_TEXT, TURN_END}
        return {token: number for number, token in enumerate(self.tokens) if token in wanted}

    def tokenizer_json(self) -> bytes:
        """tokenizer.json; raises CheckpointError for a tokenizer that is not this family's, or damaged."""
        model, rule = (self.gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if model != "gpt2" or rule not in SPLITTING:
            raise CheckpointError(
                f"{self._where}: the tokenizer is {model!r:.40} with the rule {rule!r:.40}, and this family's is "
                "'gpt2' with 'qwen35': take a GGUF that llama.cpp's converter made of the original"
            )
        byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
        split = {"type": "Split", "pattern": {"Regex": SPLITTING[rule]}, "behavior": "Isolated", "invert": False}
        made = {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": list(self._added()),
            "normalizer": {"type": "NFC"},
            "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": self._plain(),
                "merges": list(self._merges()),
            },
        }
        return json.dumps(made, ensure_ascii=False).encode("utf-8", "surrogatepass")

    def _plain(self) -> dict[str, int]:
        plain: dict[str, int] = {}
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind == NORMAL and plain.setdefault(token, number) != number:
                raise CheckpointError(
                    f"{self._where}: tokenizer.ggml.tokens has {token!r:.60} twice, as {plain[token]} and as {number}: "
                    "download the file again"
                )
        return plain

    def _added(self) -> Iterable[dict[str, Any]]:
        for number, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind in (CONTROL, USER_DEFINED):
                yield {
                    "id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
                    "normalized": False, "special": kind == CONTROL and token not in _NOT_SPECIAL,
                }  # fmt: skip

    def _merges(self) -> Iterable[list[str]]:
        for number, merge in enumerate(self._array("merges", STRING)):
            left, space, right = merge.partition(" ")
            if not (left and space and right) or " " in right:
                raise CheckpointError(
                    f"{self._where}: tokenizer.ggml.merges[{number}] is {merge!r:.60}, where two tokens are expected: "
                    "download the file again"
                )
            yield [left, right]

    def template(self) -> str | None:
        """The chat template; None where the file has none."""
        found = self.gguf.metadata.get("tokenizer.chat_template")
        return found if isinstance(found, str) else None

    def tokenizer_config(self) -> dict[str, Any]:
        """tokenizer_config.json: the token that ends a turn, and that which pads."""
        made: dict[str, Any] = {"tokenizer_class": "Qwen2Tokenizer"}
        for key, name in (("eos_token_id", "eos_token"), ("padding_token_id", "pad_token")):
            number = self.gguf.metadata.get(f"tokenizer.ggml.{key}")
            if type(number) is int and 0 <= number < len(self.tokens) and self.kinds[number] in (CONTROL, USER_DEFINED):
                made[name] = self.tokens[number]
        return made
