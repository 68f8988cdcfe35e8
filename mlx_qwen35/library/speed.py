"""How fast answers will come from a model whose experts are on the disk: computed, from two probes of this machine.

Knows where records lie, how quickly this disk gives some of them and this device multiplies one row, and which part of
the experts is found in memory by routing as it was drawn for benchmarks/replay.py. What follows is a model, and is
called that: routing of a real text may be easier or harder.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.conversion.disk import PAGE
from mlx_qwen35.experts.layout import Extent, LayerLayout
from mlx_qwen35.machine.files import allow_open, can_forget, forget, pass_cache_by

# Share of the experts in memory -> of those asked for, how many are found there: on the hardest and on the easiest
# routing of benchmarks/results/replay.json (SLRU, the policy that is used; tests/library/test_speed.py compares).
HITS = (
    (0.0, 0.0, 0.0), (0.02, 0.03, 0.64), (0.061, 0.12, 0.74), (0.125, 0.21, 0.80), (0.25, 0.36, 0.86),
    (0.375, 0.48, 0.90), (0.5, 0.60, 0.93), (0.75, 0.81, 0.97), (1.0, 1.0, 1.0),
)  # fmt: skip
# One synchronization a layer and the Python around it, measured on a 2-core Linux machine: benchmarks/experts.py --only
# layer. A Mac's own was not measured.
LAYER_SECONDS = 0.3e-3
FROM_MEMORY = "(some of it may have come from the system's memory and not from the disk: then the disk gives less)"
_PROBE_SECONDS = 0.5
_FILE_SECONDS, _PATIENCE = 1.0, 4.0  # of file_speed(); how long it waits for a disk beyond that
_STRETCH = 4 << 20
_ROWS, _COLUMNS, _PRODUCTS = 16384, 4096, 4  # of the 4-bit product that is timed: 38 MB, more than caches hold


@dataclass(frozen=True)
class Expected:
    """A model, not a measurement.

    hits: of the experts asked for, how many are in memory, least and most. tokens: of an answer a second, by them.
    chunk_seconds: to read all experts once, for a chunk of a prompt. disk, disk_deep: bytes a second, as many records
    at once as a token asks for, and many at once. device: bytes of weights a second, one row. from_memory: some of what
    was read may have lain in memory, which this system does not let a program empty: a disk may give less.
    """

    hits: tuple[float, float]
    tokens: tuple[float, float]
    chunk_seconds: float
    disk: float
    disk_deep: float
    device: float
    from_memory: bool = False

    def as_dict(self) -> dict[str, Any]:
        return vars(self) | {"modelled": True}

    def lines(self, chunk: int) -> list[str]:
        """For people. chunk: tokens of a prompt."""
        (least, most), (slow, fast) = self.hits, self.tokens
        return [
            f"  Modelled, not measured, from what this disk was found to give: {self.disk / 1e9:.1f} GB/s for the "
            f"experts of a token, {self.disk_deep / 1e9:.1f} GB/s for many:",
            *([f"    {FROM_MEMORY}"] if self.from_memory else []),
            f"    an answer: {slow:.3g} to {fast:.3g} tokens a second, if {least:.0%} to {most:.0%} of the experts "
            "asked for are in memory",
            f"    a prompt: {self.chunk_seconds:.3g} s to read the experts of every {chunk:,} tokens, while computing",
        ]


def expected(
    *, share: float, layers: int, token_bytes: int, chunk_bytes: int, active_bytes: int, disk: float, disk_deep: float,
    device: float,
) -> Expected:  # fmt: skip
    """share: of the experts in memory; layers: that are streamed. Bytes: of all experts of one token, read for a chunk
    of a prompt, and multiplied with for one token. Speeds in bytes a second."""
    hits = hit_rates(share)
    computing = active_bytes / device + layers * LAYER_SECONDS
    slow, fast = (1 / (computing + (1 - hit) * token_bytes / disk) for hit in hits)
    return Expected(hits, (slow, fast), chunk_bytes / disk_deep, disk, disk_deep, device, not can_forget())


def hit_rates(share: float) -> tuple[float, float]:
    """The least and the most expected with this share of the experts in memory; on lines between the points of HITS."""
    for (before, *lower), (after, *upper) in zip(HITS, HITS[1:], strict=False):
        if share <= after:
            part = (share - before) / (after - before)
            low, high = (a + (b - a) * part for a, b in zip(lower, upper, strict=True))
            return low, high
    return 1.0, 1.0


def disk_speed(layouts: Mapping[int, LayerLayout], at_once: int, threads: int = 8) -> tuple[float, float]:
    """Bytes a second of whole experts at random places, not from the page cache where the system lets that be emptied.

    -> (`at_once` experts of one layer, then the next layer, as an answer asks for them; with no end, as a prompt does).
    Raises OSError if a file cannot be read.
    """
    rng = random.Random(0)
    paths = {file for layout in layouts.values() for file in layout.files}
    allow_open(len(paths))
    files = {path: os.open(path, os.O_RDONLY) for path in paths}
    try:
        for descriptor in files.values():
            pass_cache_by(descriptor)

        def read(extents: Sequence[Extent]) -> int:
            done = 0
            for extent in extents:
                forget(files[extent.file], extent.offset, extent.nbytes)
                block = memoryview(bytearray(extent.nbytes))
                done += os.preadv(files[extent.file], [block], extent.offset)
            return done

        def some() -> list[Sequence[Extent]]:
            layout = layouts[rng.choice(list(layouts))]
            chosen = rng.sample(range(layout.num_experts), min(at_once, layout.num_experts))
            return [layout.extents(expert) for expert in chosen]

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, some()))  # threads are there
            shallow = _speed(lambda: sum(pool.map(read, some())))
            deep = _speed(lambda: sum(pool.map(read, [extents for _ in range(8) for extents in some()])))
            return shallow, deep
    finally:
        for descriptor in files.values():
            os.close(descriptor)


def file_speed(path: Path, threads: int = 8) -> tuple[float, int]:
    """(bytes a second, bytes) of reading stretches of a file at random places for a second, past the page cache as far
    as the system lets that be.

    Raises OSError if it cannot be read, or if the disk does not answer within some seconds.
    """
    size, done, problems = path.stat().st_size, [0] * threads, []
    stretch = min(_STRETCH, max(1, size))
    began, last = time.perf_counter(), time.perf_counter() + _FILE_SECONDS

    def read(number: int) -> None:
        rng, block = random.Random(number), memoryview(bytearray(stretch))
        try:
            with open(path, "rb", buffering=0) as file:
                pass_cache_by(file.fileno())
                while True:  # once at least, however busy the machine is
                    place = rng.randrange(0, size - stretch + 1) // PAGE * PAGE
                    forget(file.fileno(), place, stretch)
                    done[number] += os.preadv(file.fileno(), [block], place)
                    if time.perf_counter() >= last:
                        break
        except OSError as error:
            problems.append(error)

    readers = [threading.Thread(target=read, args=(number,), daemon=True) for number in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(max(0.0, last + _PATIENCE - time.perf_counter()))
    if problems:
        raise problems[0]
    if any(reader.is_alive() for reader in readers):
        raise TimeoutError(f"{path.name} was not read within {_FILE_SECONDS + _PATIENCE:.0f} s")
    return sum(done) / (time.perf_counter() - began), sum(done)


def device_speed() -> float:
    """Bytes of 4-bit weights a second that this device multiplies with one row."""
    weight, scales, biases = mx.quantize(mx.random.normal((_ROWS, _COLUMNS)), group_size=64, bits=4)
    row = mx.random.normal((1, _COLUMNS)).astype(mx.float32 if mx.default_device() == mx.cpu else mx.bfloat16)
    scales, biases = scales.astype(row.dtype), biases.astype(row.dtype)
    mx.eval(weight, scales, biases, row)

    def products() -> int:
        made = [
            mx.quantized_matmul(row * number, weight, scales, biases, group_size=64, bits=4)
            for number in range(_PRODUCTS)
        ]
        mx.eval(made)
        return _PRODUCTS * (weight.nbytes + scales.nbytes + biases.nbytes)

    products()  # kernels are compiled
    return _speed(products)


def _speed(work: Callable[[], int]) -> float:
    """Bytes a second of work() -> bytes, again and again for half a second."""
    done, start = 0, time.perf_counter()
    while True:
        done += work()
        spent = time.perf_counter() - start
        if spent >= _PROBE_SECONDS:
            return done / spent
