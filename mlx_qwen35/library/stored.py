"""A model on this disk and the names that people call it by.

Knows folder names and how publishers spell a quantization in them. Opens no file but config.json, and that only to
learn how many bits the weights have. Knows nothing of where folders are kept.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.gguf.choosing import is_gguf, models_in, variant_of
from mlx_qwen35.machine.files import is_litter

# Qwen3.5-35B-A3B-MLX-4bit, Qwen3.5-27B-4bit-DWQ, Qwen3.5-4B-FP8, Qwen3.5-9B-GPTQ-Int4, Qwen3.5-2B-mlx, ...-GGUF
_SUFFIX = re.compile(
    r"(?P<stem>.+?)(?P<mlx>-mlx)?"
    r"(?:-(?P<variant>(?:\d+(?:\.\d+)?-?bit|bf16|fp?16|fp?32|fp8|mxfp[48]|nvfp4|gptq|awq|int[48]|q\d)(?:[-_].+)?))?"
    r"(?:-gguf)?",
    re.IGNORECASE,
)
_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Stored:
    """A folder of a model, or the first file of a GGUF. name: to load it by; place: whose folder it is in, in words."""

    name: str
    folder: Path
    place: str

    @property
    def model(self) -> str:
        """The name without its publisher and revision."""
        return self.name.rpartition("/")[2].partition("@")[0]

    @cached_property
    def stems(self) -> frozenset[str]:
        """What the model is called once its quantization is left out, in lower case."""
        found = _SUFFIX.fullmatch(self.model.lower())
        assert found  # any text that is not empty
        return frozenset({found["stem"], found["stem"] + (found["mlx"] or "")})

    @cached_property
    def variants(self) -> frozenset[str]:
        """What may stand behind "@", in lower case: from the name ("4bit", "4bit-dwq") and from config.json."""
        found = _SUFFIX.fullmatch(self.model.lower())
        named = found["variant"] if found else None
        file = variant_of(self.folder)
        told = {*_from_config(self.folder), *({file} if file else ())}
        return frozenset({*told, *({named, named.partition("-")[0]} if named else ())})

    @property
    def variant(self) -> str:
        """The one to show."""
        return min(self.variants, key=lambda v: (len(v), v), default="?")

    @property
    def is_gguf(self) -> bool:
        """Whether it is a GGUF, or a folder of them without any other weights."""
        return is_gguf(self.folder)


def each_model(stored: Stored) -> list[Stored]:
    """The models of a folder: each GGUF in it by itself, told apart by how it is quantized, or the folder as one.

        unsloth/Qwen3.5-9B-GGUF: Qwen3.5-9B-Q4_K_M.gguf  ->  unsloth/Qwen3.5-9B-GGUF@q4_k_m
    """
    files = models_in(stored.folder) if stored.is_gguf else []
    if not files:
        return [stored]
    if len(files) == 1:
        return [replace(stored, folder=files[0])]
    variants = [variant_of(file) for file in files]
    return [
        replace(stored, name=f"{stored.name}@{v}" if v and variants.count(v) == 1 else str(file), folder=file)
        for file, v in zip(files, variants, strict=True)
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON file as an object; {} for whatever is missing, unreadable or something else."""
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def expanded(path: str | Path) -> Path:
    """~ as the user's home, where there is one; any text is a path to this."""
    text = os.fspath(path)
    return Path(text if "\0" in text else os.path.expanduser(text))


def subfolders(folder: Path) -> Iterator[Path]:
    """The folders in a folder by name, without hidden ones; none where it cannot be listed."""
    try:
        here = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except (OSError, ValueError):
        return
    yield from (folder / name for name in here if not name.startswith(".") and not is_litter(name))


def _from_config(folder: Path) -> Iterator[str]:
    config = read_json(folder / "config.json")
    text = config.get("text_config")
    sections = [section for section in (config, text) if isinstance(section, dict)]
    for section in sections:
        for key in ("quantization", "quantization_config"):
            quantization = section.get(key)
            if isinstance(quantization, dict):
                if isinstance(quantization.get("quant_method"), str):
                    yield quantization["quant_method"].lower()
                if isinstance(quantization.get("bits"), int):
                    yield f"{quantization['bits']}bit"
                if quantization.get("mode") not in (None, "affine"):
                    yield str(quantization["mode"]).lower()
                return
    for section in sections:
        for key in ("dtype", "torch_dtype"):
            named = section.get(key)
            if isinstance(named, str) and named in _DTYPES:
                yield _DTYPES[named]
                return
