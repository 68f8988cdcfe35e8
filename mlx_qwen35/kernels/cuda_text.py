"""A Metal kernel's body as CUDA text: what is spelled differently is respelled, all other names are defined.

Knows the two languages as far as bodies here use them. Knows no operation.
"""

from __future__ import annotations

import re
from pathlib import Path

# Put before the body: Metal's names in CUDA.
CUDA_NAMES = (Path(__file__).parent / "cuda_names.cuh").read_text()

_SHARED = re.compile(r"(^|[;{}\n])(\s*)threadgroup\s+([\w:<> ]+?\s+\w+\s*(?:\[[^;=]*?\])*)\s*;")
_SPACE = re.compile(r"\b(?:device|constant|threadgroup|thread)\b(?=\s+[\w*&(])")
_VECTOR = re.compile(r"(?<![\w.])((?:float|int|uint|short|ushort)[234])\s*\(")


def cuda_body(text: str) -> str:
    """Threadgroup variables become shared ones, other address spaces go, vectors are made by CUDA's functions."""
    text = _SHARED.sub(r"\1\2__shared__ \3;", text)
    return _VECTOR.sub(r"make_\1(", _SPACE.sub("", text))
