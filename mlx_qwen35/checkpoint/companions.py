"""What belongs to a checkpoint beside its weights: tokenizer, template, generation and preprocessor files, licences.

Knows their names, and which files speak of the source's own weights and stay behind. Knows nothing of what they say.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mlx_qwen35.checkpoint.files import ReadError
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf
from mlx_qwen35.checkpoint.gguf.opened import open_model
from mlx_qwen35.machine.files import listed
from mlx_qwen35.text.files import MadeFolder

_PATTERNS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
# What the source says of its own weights.
_OWN = (
    "config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json", "jang_config.json",
    "mtplx_runtime.json",
)  # fmt: skip


@dataclass(frozen=True)
class Companion:
    """A file beside the weights: one that lies at `path`, or `data` that was made of what the weights' file says."""

    name: str
    path: Path | None = None
    data: bytes = b""

    @property
    def nbytes(self) -> int:
        return len(self.data) if self.path is None else self.path.stat().st_size

    def read(self) -> bytes:
        """All of it; raises ReadError."""
        if self.path is None:
            return self.data
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise _unreadable(error, self.path) from None

    def check(self) -> None:
        """Raises ReadError where it cannot be read."""
        if self.path is None:
            return
        try:
            self.path.open("rb").close()
        except OSError as error:
            raise _unreadable(error, self.path) from None


def companions(path: Path) -> list[Companion]:
    """Those of a checkpoint, by name; links that lead nowhere are among them."""
    if is_gguf(path):
        return [Companion(name, data=data) for name, data in sorted(open_model(path).companions().items())]
    found = {file for pattern in _PATTERNS for file in listed(path, pattern) if file.is_symlink() or file.is_file()}
    found = {file for file in found if not file.is_dir()}
    kept = sorted(file for file in found if file.name not in _OWN and not file.name.endswith(".index.json"))
    return [Companion(file.name, file) for file in kept]


def small_files(path: Path) -> Path | MadeFolder:
    """Where tokenizer, template and their like are read from: the folder, or, of a GGUF, what its metadata makes."""
    return MadeFolder(path, open_model(path).companions()) if is_gguf(path) else path


def _unreadable(error: OSError, path: Path) -> ReadError:
    if path.is_symlink() and not path.exists():
        return ReadError(f"{path} is a link to {os.readlink(path)}, which is not there: finish the download")
    return ReadError(f"{path} cannot be read ({error.strerror or error}): check the disk and its permissions")
