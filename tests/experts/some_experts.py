"""Files with a few experts, memory for them, and a disk that misbehaves.

Knows layouts and what lies where. Knows nothing of who reads.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35.experts import handles
from mlx_qwen35.experts.cast import converter
from mlx_qwen35.experts.layout import Extent, LayerLayout, Tensor
from mlx_qwen35.experts.reader import Target

EXPERTS = 7
TENSORS = (
    Tensor("gate_proj.weight", "U32", (40, 37)), Tensor("gate_proj.scales", "F16", (40, 5)),
    Tensor("up_proj.weight", "U8", (12_289,)), Tensor("down_proj.weight", "BF16", (50, 61)),
)  # fmt: skip
SIZE = sum(tensor.nbytes for tensor in TENSORS)


class Files:
    """Two layers: 0 stacked, in one file with a bit of everything between; 1 with every expert for itself, in two."""

    def __init__(self, folder: Path):
        rng = np.random.RandomState(3)
        self.values = {
            (layer, expert): [rng.bytes(tensor.nbytes) for tensor in TENSORS]
            for layer in range(2) for expert in range(EXPERTS)
        }  # fmt: skip
        blob, first = bytearray(b"h" * 113), []
        for number, tensor in enumerate(TENSORS):
            first.append(Extent(folder / "a", len(blob), tensor.nbytes))
            for expert in range(EXPERTS):
                blob += self.values[0, expert][number]
        (folder / "a").write_bytes(blob)
        steps = tuple(tensor.nbytes for tensor in TENSORS)
        blobs, places = {"b": bytearray(), "c": bytearray(b"h" * 20)}, []
        for expert in range(EXPERTS):
            place = []
            for number in range(len(TENSORS)):
                name = "bc"[(expert + number) % 2]
                data = self.values[1, expert][number]
                place.append(Extent(folder / name, len(blobs[name]), len(data)))
                blobs[name] += data + bytes(10 * expert)
            places.append(tuple(place))
        for name, data in blobs.items():
            (folder / name).write_bytes(data)
        self.layouts = {
            0: LayerLayout(0, EXPERTS, TENSORS, (tuple(first),), steps),
            1: LayerLayout(1, EXPERTS, TENSORS, tuple(places)),
        }  # fmt: skip


class Memory:
    """Where one expert goes, filled with what was there before."""

    def __init__(self, convert: str | None = None):
        self.arrays, self.targets = [], []
        for tensor in TENSORS:
            made = converter(tensor.dtype, convert) if convert and tensor.dtype in ("F16", "BF16") else None
            size = tensor.nbytes * (2 if made and convert == "float32" else 1)
            self.arrays.append(np.full(size, 0xA5, np.uint8))
            self.targets.append(Target(memoryview(self.arrays[-1]), made))
        self._convert = convert

    def holds(self, values: list[bytes]) -> bool:
        expected = []
        for tensor, value, target in zip(TENSORS, values, self.targets, strict=True):
            if target.convert is not None:
                out = bytearray(target.view.nbytes)
                converter(tensor.dtype, self._convert)(memoryview(value), memoryview(out))
                value = bytes(out)
            expected.append(value)
        return [array.tobytes() for array in self.arrays] == expected

    @property
    def untouched(self) -> bool:
        return all((array == 0xA5).all() for array in self.arrays)


class Disk:
    """Stands before preadv: lets nobody through while it is shut, takes time, or fails. Nothing is in memory yet."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.opened, self.before, self.entered = threading.Event(), lambda: None, threading.Semaphore(0)
        self.opened.set()
        self._whole = os.preadv
        monkeypatch.setattr(handles.os, "preadv", self._preadv)

    def _preadv(self, *args: object) -> int:
        if len(args) > 3:
            raise BlockingIOError
        self.entered.release()
        assert self.opened.wait(20)
        self.before()
        return self._whole(*args)

    @contextmanager
    def shut(self) -> Iterator[None]:
        self.opened.clear()
        try:
            yield
        finally:
            self.opened.set()


def soon(true: Callable[[], bool]) -> None:
    """Wait for what does not take long."""
    for _ in range(4000):
        if true():
            return
        time.sleep(0.005)
    raise AssertionError("it did not happen")


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("expert-reader")]
