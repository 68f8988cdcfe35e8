"""What the store of prefixes costs: finding a beginning among many paths, looking at many files, copying or sharing.

    python benchmarks/store.py [lookup] [files] [sharing]

lookup: 1,000 paths of 100,000 tokens that part from each other anywhere, and a prompt that has 90,000 in common.
files: a folder of 1,000 files with 100,000 tokens and the tensors of 60 layers each is looked at; none is read.
sharing: one attention layer's step over a past that is the row's own copy and over one that is shared, and what making
the copy takes; heads of the 0.8B and the 397B, float32 on the CPU.
Least of several rounds in milliseconds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

PATHS, TOKENS, TRUNK = 1000, 100_000, 90_000
HEADS = {"0.8B": (8, 2, 256), "397B": (32, 2, 256)}
POSITIONS = (1024, 4096, 8192, 16384, 32768)


def least(work: Callable[[], Any], rounds: int = 7) -> float:
    """Milliseconds."""
    times = []
    for _ in range(rounds + 1):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times[1:])


def lookup() -> None:
    import numpy as np

    from mlx_qwen35.session.tree import Tree, key_of

    rng, tree = np.random.default_rng(0), Tree()
    trunk = rng.integers(0, 150_000, TRUNK)
    for path in range(PATHS):
        at = TRUNK if path % 2 else int(rng.integers(1000, TRUNK))
        tree.put(path, np.concatenate([trunk[:at], rng.integers(0, 150_000, TOKENS - at)]))
    prompt = np.concatenate([trunk, rng.integers(0, 150_000, TOKENS - TRUNK)]).tolist()
    key = key_of(prompt)
    print(f"lookup | {PATHS} paths of {TOKENS} tokens | key {least(lambda: key_of(prompt)):.1f} ms", end=" | ")
    print(f"the nearest {least(lambda: next(tree.meeting(key))):.1f} ms", end=" | ")
    print(f"all {least(lambda: list(tree.meeting(key))):.1f} ms")


def files() -> None:
    import mlx.core as mx

    from mlx_qwen35.session import file

    arrays = {"tokens": mx.arange(TOKENS).astype(mx.uint32)}
    arrays |= {f"marks.{mark}.{layer}.{kind}": mx.zeros(4) for mark in range(3) for layer in range(60) for kind in "cm"}
    marks = [{"offset": at, "met": True, "rope_delta": 0} for at in (1000, 50_000, 99_000)]
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{number}.path" for number in range(PATHS)]
        file.write(paths[0], {"marks": marks, "shown": [], "fingerprint": {}}, arrays)
        for path in paths[1:]:
            os.link(paths[0], path)
        took = least(lambda: [file.read_beginning(path) for path in paths], 1)
    print(f"files | {PATHS} of {TOKENS} tokens | looked at in {took:.0f} ms")


def sharing() -> None:
    import mlx.core as mx

    from mlx_qwen35.cache import KVCache
    from mlx_qwen35.cache.copies import copied
    from mlx_qwen35.layers.attention import cached_attention

    for name, (heads, kv_heads, dim) in HEADS.items():
        query, key, value = (mx.random.normal((1, count, 1, dim)) for count in (heads, kv_heads, kv_heads))
        for positions in POSITIONS:
            whole = KVCache()
            whole.update(*(mx.random.normal((1, kv_heads, positions, dim)) for _ in range(2)))
            mx.eval(whole.arrays())

            def step(cache: Any, query: Any = query, key: Any = key, value: Any = value) -> None:
                mx.eval(cached_attention(query, key, value, cache))

            took = least(lambda whole=whole: copied(whole, whole.offset, room=whole.offset + 256), 3)
            own, shared = copied(whole, positions, room=positions + 256), copied(whole, positions, share=True)
            alone, beside = (least(lambda cache=cache: step(cache)) for cache in (own, shared))
            size = 2 * 2 * kv_heads * positions * dim / 2**20
            print(f"sharing | {name} | {positions} | own {alone:.2f} ms | shared {beside:.2f} ms", end=" | ")
            print(f"copy {took:.1f} ms | {size:.0f} MiB a layer in bfloat16")


def main() -> None:
    parts = {"lookup": lookup, "files": files, "sharing": sharing}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(parts)} (default: all)")
    asked = parser.parse_args().parts or [*parts]
    if unknown := [name for name in asked if name not in parts]:
        parser.error(f"there is no part {unknown[0]}: give some of {', '.join(parts)}")
    import mlx.core as mx

    mx.set_default_device(mx.cpu)
    for name in asked:
        parts[name]()


if __name__ == "__main__":
    main()
