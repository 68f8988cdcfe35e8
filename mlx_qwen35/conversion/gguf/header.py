"""The beginning of a GGUF file: metadata, and where each tensor lies, before any of it is there.

Knows the format (version 3, little-endian). Knows nothing of models.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping

from mlx_qwen35.checkpoint.gguf.types import ALIGNMENT, ARRAY, FORMATS, LONGEST_NAME, MAGIC, STRING, VERSION, Kind
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.conversion.gguf.metadata import Value


def header(
    metadata: Mapping[str, Value], tensors: Iterable[tuple[str, Kind, Shape, int]]
) -> tuple[bytes, dict[str, tuple[int, int]]]:
    """The first bytes of a file, and where in it each tensor lies: name -> (offset, bytes).

    tensors: (name, type, shape as torch has it, bytes), in the order of the file.
    """
    tensors = list(tensors)
    start = MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata))
    found = [start, *(_text(key) + _value(value) for key, value in metadata.items())]
    end, places = 0, {}
    for name, kind, shape, nbytes in tensors:
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"{name} is longer than ggml's names")
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        found.append(_text(name) + dimensions + struct.pack("<IQ", kind.number, end))
        places[name] = end, nbytes
        end += nbytes + -nbytes % ALIGNMENT
    whole = b"".join(found)
    whole += bytes(-len(whole) % ALIGNMENT)
    return whole, {name: (len(whole) + offset, nbytes) for name, (offset, nbytes) in places.items()}


def _value(value: Value) -> bytes:
    if not value.many:
        return struct.pack("<I", value.kind) + _plain(value.kind, [value.value])
    count = struct.pack("<IIQ", ARRAY, value.kind, len(value.value))
    return count + _plain(value.kind, value.value)


def _plain(kind: int, values: list) -> bytes:
    if kind == STRING:
        return b"".join(map(_text, values))
    return struct.pack(f"<{len(values)}{FORMATS[kind]}", *values)


def _text(text: str) -> bytes:
    data = text.encode("utf-8")
    return struct.pack("<Q", len(data)) + data
