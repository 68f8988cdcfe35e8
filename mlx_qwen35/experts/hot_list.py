"""The experts that were in memory when a model was last let go of: a small file, for a warm start.

Knows the file and nothing of what is done with it. It is a hint: one that is missing, damaged or of another checkpoint
says nothing, and one that cannot be written is not written. A wrong list could only cost time: what is read by it are
this checkpoint's experts all the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from ..machine.files import listed

FORMAT, VERSION = "mlx-qwen35-hot-experts", 1
MOST_BYTES = 1 << 20  # of a file; 60 layers of 512 experts are 150 KB
MOST_FILES = 32  # in a folder: those of checkpoints that were not used for longest are deleted


class HotList:
    """One checkpoint's file. fingerprint: of the checkpoint, also the file's name in `folder`."""

    def __init__(self, folder: Path, fingerprint: str):
        self.path, self._fingerprint = folder / f"{fingerprint}.json", fingerprint

    def read(self, num_experts: Mapping[int, int]) -> dict[int, list[int]]:
        """By layer the experts, the most valuable first; nothing where the file is not good.

        num_experts: of each layer that may be in it.
        """
        try:
            with open(self.path, "rb") as file:
                told = json.loads(file.read(MOST_BYTES))
            if (told["format"], told["version"], told["checkpoint"]) != (FORMAT, VERSION, self._fingerprint):
                return {}
            found = {int(layer): experts for layer, experts in told["layers"].items()}
            return found if all(_good(experts, num_experts[layer]) for layer, experts in found.items()) else {}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return {}

    def write(self, layers: Mapping[int, Sequence[int]]) -> None:
        """Replace the file, as a whole or not at all."""
        told = {"format": FORMAT, "version": VERSION, "checkpoint": self._fingerprint}
        text = json.dumps(told | {"layers": {str(layer): list(experts) for layer, experts in layers.items()}})
        beside = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        if len(text) > MOST_BYTES:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(text)
            os.replace(beside, self.path)
            _forget_old(self.path.parent)
        except OSError:
            with suppress(OSError):
                beside.unlink()


def _good(experts: object, num_experts: int) -> bool:
    """Whether it is a list of experts, each named once."""
    if not isinstance(experts, list) or not all(type(e) is int and 0 <= e < num_experts for e in experts):
        return False
    return len(set(experts)) == len(experts)


def _forget_old(folder: Path) -> None:
    files = sorted(listed(folder, "*.json*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for path in files[MOST_FILES:]:
        path.unlink()
