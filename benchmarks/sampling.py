"""What drawing a token costs: rows together (RowsSampler) beside a call for each row, and what both would launch.

    python benchmarks/sampling.py [--rows 8] [--rounds 15] [--out FILE]

Milliseconds on this machine, [fastest .. slowest], in turns; the published head (248,320 rows, 248,077 tokens), random
logits. "tokens" reads only the tokens, as a decode step does; "logprobs" reads the log probabilities too. Launches are
counted for Metal from the traced graph (benchmarks/graph.py), nothing of it ran: of the first column alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import mlx.core as mx  # noqa: E402

from benchmarks.graph import PretendedMetal, shape_only, trace  # noqa: E402
from benchmarks.measuring import circumstances, in_turns, spread, summary, write  # noqa: E402
from mlx_qwen35.sampling import History, Sampler, Sampling  # noqa: E402
from mlx_qwen35.sampling.rows import RowsSampler  # noqa: E402

VOCAB, TOKENS = 248_320, 248_077
CASES = {
    "greedy": {},
    "published": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},  # generation_config.json
    "temperature": {"temperature": 1.0},
}


def pairs(case: str, rows: int) -> list[tuple[Sampler, History]]:
    samplings = [Sampling(seed=seed, **CASES[case]) for seed in range(rows)]
    found = [(Sampler(sampling, TOKENS), History(sampling, [[]], VOCAB)) for sampling in samplings]
    mx.eval([sampler.key for sampler, _ in found])
    return found


def launches(case: str, rows: int, outputs: int) -> int:
    """outputs: 1 for the tokens, 2 with log probabilities."""
    sampler = RowsSampler(pairs(case, rows))
    sampler(mx.zeros((rows, VOCAB)))
    mx.eval([group._keys for group in sampler._groups])  # what is put together once is no part of a step
    with PretendedMetal():
        found = trace(
            lambda logits: list(sampler(logits)[:outputs]), {"logits": shape_only((rows, VOCAB), mx.bfloat16)}
        )
    return sum(launch.count for launch in found)


def measure(case: str, rows: int, rounds: int, outputs: int) -> dict[str, dict[str, float]]:
    """Milliseconds: median, least and most."""
    logits = 3 * mx.random.normal((rows, VOCAB), key=mx.random.key(0))
    mx.eval(logits)
    own, together = pairs(case, rows), RowsSampler(pairs(case, rows))

    def timed(way: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            mx.eval(way())
            return 1e3 * (time.perf_counter() - start)

        return run

    ways = {
        "together": lambda: together(logits)[:outputs],
        "each": lambda: [own[row][0](logits[row : row + 1], own[row][1])[:outputs] for row in range(rows)],
        "one": lambda: own[0][0](logits[:1], own[0][1])[:outputs],
    }
    times = in_turns([timed(way) for way in ways.values()], rounds)
    return {name: summary(of) for name, of in zip(ways, zip(*times, strict=True), strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    rows, around, records = arguments.rows, circumstances(), []
    print(f"{'':22s}{f'{rows} together':>26s}{f'{rows} calls':>26s}{'one call':>26s}   launches at 1 and {rows} rows")
    for case in CASES:
        for outputs, read in enumerate(("tokens", "logprobs"), 1):
            found = measure(case, rows, arguments.rounds, outputs)
            counted = [launches(case, count, outputs) for count in (1, rows)]
            cells = "".join(f"{spread(of, '.2f'):>26s}" for of in found.values())
            print(f"{f'{case}, {read}':22s}{cells}   {counted[0]}, {counted[1]}")
            records.append({"benchmark": "sampling", "case": case, "read": read, "rows": rows, "ms": found})
            records[-1]["launches"] = counted
    print()
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
