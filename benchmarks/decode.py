"""How long a token takes after the first: this package beside mlx-lm (and mlx-vlm), on the same checkpoint.

    python benchmarks/decode.py [--case 0.8B small-moe] [--prompt 32] [--tokens 24] [--rounds 5] [--peer mlx-lm mlx-vlm]

As prefill.py: every side is a process that has the checkpoint loaded, and they take turns. A round's figure is the
median over its tokens. Prints a table, and one JSON line per case and peer, as METHODOLOGY.md describes.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import sides  # noqa: E402
from benchmarks.measuring import circumstances, write  # noqa: E402
from benchmarks.prefill import against_peers, measure, table  # noqa: E402


def main() -> None:
    parser = sides.arguments(__doc__.splitlines()[0], 5, ("0.8B", "small-moe"))
    parser.add_argument("--prompt", type=int, default=32, help="tokens before the first (32)")
    parser.add_argument("--tokens", type=int, default=24, help="after the first, in a round (24)")
    arguments = parser.parse_args()
    around = circumstances()
    records = []
    for name in arguments.case:
        case = sides.CASES[name]
        how = (arguments.folder, arguments.rounds, arguments.prompt, arguments.tokens + 1)
        rounds = measure(case, arguments.peer, *how)
        median = lambda answer: statistics.median(answer["later"])  # noqa: E731
        records += against_peers("decode", "decode, a token", case, arguments.peer, rounds, median)
    print(*table(records), sep="\n")
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
