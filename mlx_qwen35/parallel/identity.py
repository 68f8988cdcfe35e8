"""Whether two machines have the same checkpoint: a hash of what its headers say and of some of its bytes.

Knows sources. Compares nothing.
"""

from __future__ import annotations

import hashlib
import json
import os

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.source import Source

_TENSORS, _BYTES = 48, 256


def identity(source: Source) -> str:
    """Equal for copies of one checkpoint, whatever their files and folders are called; different for another one, but
    for what hides between the bytes that are looked at: 256 in the middle of 48 tensors."""
    entries: dict[tuple[str, int], Entry] = {}
    for part in source.parts.values():
        for entry in part.entries:
            entries[entry.name, entry.offset] = entry
    ordered = [entries[key] for key in sorted(entries)]
    made = hashlib.blake2b(json.dumps(source.config.raw, sort_keys=True).encode(), digest_size=16)
    made.update(repr([(entry.name, entry.dtype, entry.shape) for entry in ordered]).encode())
    step = max(1, len(ordered) // _TENSORS)
    for entry in ordered[::step]:
        with open(entry.file, "rb") as file:
            middle = max(0, entry.nbytes // 2 - _BYTES // 2)
            made.update(os.pread(file.fileno(), min(_BYTES, entry.nbytes), entry.offset + middle))
    return made.hexdigest()
