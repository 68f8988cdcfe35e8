"""A model on this disk and the names that people call it by.

Knows folder names and how publishers spell a quantization in them. Opens no file but config.json, and that only to
learn how many bits the weights have. Knows nothing of where folders are kept.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mlx_qwen35.machine.files import is_litter, listed

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
    """A folder of a model. name: to load it by; place: whose folder it lies in, in words."""

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
        return frozenset({*_from_config(self.folder), *({named, named.partition("-")[0]} if named else ())})

    @property
    def variant(self) -> str:
        """The one to show."""
        return min(self.variants, key=lambda v: (len(v), v), default="?")

    @property
    def is_gguf(self) -> bool:
        """Whether the folder has llama.cpp's files and none that this package reads."""
        return any(listed(self.folder, "*.gguf")) and not any(listed(self.folder, "*.safetensors"))


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
