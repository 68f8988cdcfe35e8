"""How quickly experts are read: the reader beside a bare loop of preadv at the same sizes and depth.

    python benchmarks/reader.py [--size 35B] [--layers 2] [--rounds 9] [--together 8 64] [--folder DIR] [--out FILE]

A layer's experts are read in a random order into slots, `together` at a time (8: what a token asks for; 64: a prompt).
The bare loop has as many threads and the same calls, each into the same memory at the same offset of the same file, and
nothing else: no queue, no counts, no checks. Both take turns in one process, who is first changes from round to round.
Warm: the files are in the page cache. Cold: their pages are dropped before every reading.
Knows the reader's public calls. Writes a synthetic checkpoint of real geometry unless there is one in DIR.
Prints a table, and one JSON line a quantity (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

import numpy as np  # noqa: E402

from benchmarks.measuring import circumstances, in_turns, spread, summary, write  # noqa: E402
from mlx_qwen35.checkpoint.expert_files import expert_layouts  # noqa: E402
from mlx_qwen35.checkpoint.load import read_config  # noqa: E402
from mlx_qwen35.checkpoint.source import open_source  # noqa: E402
from mlx_qwen35.experts.layout import LayerLayout  # noqa: E402
from mlx_qwen35.experts.reader import JOB_BYTES, Reader, Target  # noqa: E402
from mlx_qwen35.machine.files import forget  # noqa: E402
from tests.experts.synthetic import synthetic_config, write_synthetic  # noqa: E402

THREADS = 8
Wanted = tuple[int, int]  # layer, expert
Memory = list[list[Target]]  # of each slot the tensors


class Bare:
    """Threads that do nothing but preadv."""

    def __init__(self, layouts: dict[int, LayerLayout]):
        self._layouts = layouts
        files = {file for layout in layouts.values() for file in layout.files}
        self._numbers = {file: os.open(file, os.O_RDONLY) for file in files}
        self._work: SimpleQueue[tuple[int, list[memoryview], int] | None] = SimpleQueue()
        self._done: SimpleQueue[None] = SimpleQueue()
        for _ in range(THREADS):
            threading.Thread(target=self._run, daemon=True).start()

    def read(self, wanted: Sequence[Wanted], memory: Memory) -> None:
        count = 0
        for (layer, expert), targets in zip(wanted, memory, strict=False):
            for job in self._layouts[layer].jobs(expert, JOB_BYTES):
                self._work.put([
                    (self._numbers[c.file], [targets[p.tensor].view[p.start : p.stop] for p in c.pieces],
                     c.offset + expert * c.step) for c in job
                ])  # fmt: skip
                count += 1
        for _ in range(count):
            self._done.get()

    def _run(self) -> None:
        while job := self._work.get():
            for call in job:
                os.preadv(*call)
            self._done.put(None)


def ours(reader: Reader) -> Callable[[Sequence[Wanted], Memory], None]:
    def read(wanted: Sequence[Wanted], memory: Memory) -> None:
        reader.wait([reader.submit(*key, targets) for key, targets in zip(wanted, memory, strict=False)])

    return read


def slots(layout: LayerLayout, count: int) -> Memory:
    arrays = [[np.zeros(tensor.nbytes, np.uint8) for tensor in layout.tensors] for _ in range(count)]
    return [[Target(memoryview(array)) for array in slot] for slot in arrays]


def drop_pages(layouts: dict[int, LayerLayout]) -> None:
    """Those of the files; nobody else's."""
    for file in {file for layout in layouts.values() for file in layout.files}:
        number = os.open(file, os.O_RDONLY)
        forget(number)
        os.close(number)


def measure(layouts: dict[int, LayerLayout], together: int, cold: bool, rounds: int) -> list[tuple[float, float]]:
    """GB/s of (ours, bare), round by round."""
    memory = slots(next(iter(layouts.values())), together)
    keys = [(layer, expert) for layer, layout in layouts.items() for expert in range(layout.num_experts)]
    order = random.Random(0).sample(keys, len(keys) // together * together)
    size = next(iter(layouts.values())).read_bytes

    def timed(read: Callable[[Sequence[Wanted], Memory], None]) -> float:
        if cold:
            drop_pages(layouts)
        start = time.perf_counter()
        for begin in range(0, len(order), together):
            read(order[begin : begin + together], memory)
        return len(order) * size / (time.perf_counter() - start) / 1e9

    bare = Bare(layouts)
    with Reader(layouts, threads=THREADS, bounce=False) as reader:
        read = ours(reader)
        return in_turns([lambda: timed(read), lambda: timed(bare.read)], rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="35B", choices=["35B", "122B", "397B"])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--together", type=int, nargs="+", default=[8, 64])
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder and args.folder.parent) as made:
        folder = args.folder
        if folder is None:
            config = synthetic_config(args.size, args.layers, vocab_size=1024)
            folder = write_synthetic(Path(made) / "model", config)
        layouts = expert_layouts(open_source(folder, read_config(folder)))
        size = next(iter(layouts.values())).read_bytes
        about = {"size": args.size, "layers": args.layers, "expert_bytes": size, "threads": THREADS}
        around, records = circumstances(), []
        print(f"{args.size}, {args.layers} layers, experts of {size / 1e6:.2f} MB, {THREADS} threads, GB/s")
        print(f"{'':20}{'ours':>24}{'preadv':>24}   ours / preadv")
        for together in args.together:
            for cold in (False, True):
                pairs = measure(layouts, together, cold, args.rounds)
                record = {"ours": summary(a for a, _ in pairs), "bare": summary(b for _, b in pairs),
                          "ratio": summary(a / b for a, b in pairs)}  # fmt: skip
                name = f"{together} experts, {'cold' if cold else 'warm'}"
                print(f"{name:20}{spread(record['ours'], '.2f'):>24}{spread(record['bare'], '.2f'):>24}"
                      f"   {spread(record['ratio'], '.2f')}")  # fmt: skip
                records.append({"benchmark": "reader", "quantity": name, "unit": "GB/s", "rounds": args.rounds}
                               | about | record)  # fmt: skip
        write(records, around, args.out)


if __name__ == "__main__":
    main()
