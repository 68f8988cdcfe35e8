"""The most memory that a process needs for a prompt and an answer: this package beside mlx-lm (and mlx-vlm).

    python benchmarks/memory.py [--case 0.8B small-moe] [--prompt 512] [--tokens 8] [--rounds 1] [--peer mlx-lm mlx-vlm]

A process for each figure: it loads the checkpoint, reads the prompt, and writes the answer (sides.py). Two figures:

    arrays    the most that MLX had allocated for arrays, as it counts itself
    process   the most that the kernel counted for the process, imported code and buffers kept for later included

Prints a table, and one JSON line per case, figure and peer, as METHODOLOGY.md describes.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import sides  # noqa: E402
from benchmarks.measuring import circumstances, compared, in_turns, spread, write  # noqa: E402

FIGURES = {"arrays": "peak", "process": "resident"}
MIB = 1 << 20


def main() -> None:
    parser = sides.arguments(__doc__.splitlines()[0], 1, ("0.8B", "small-moe"))
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    around = circumstances()
    records = []
    for name in arguments.case:
        case = sides.CASES[name]
        checkpoint = sides.checkpoint(case, arguments.folder)

        def once(side: str, checkpoint: Path = checkpoint) -> dict[str, int]:
            with sides.Side(side, checkpoint) as running:
                return running.ask(arguments.prompt, arguments.tokens)

        every = [lambda s=side: once(s) for side in ("ours", *arguments.peer)]
        rounds = in_turns(every, arguments.rounds, warm=0)
        for number, peer in enumerate(arguments.peer, 1):
            for figure, key in FIGURES.items():
                pairs = [(answers[0][key] / MIB, answers[number][key] / MIB) for answers in rounds]
                more = {"case": case.name, "cut": case.cut, "peer": peer, "prompt": arguments.prompt}
                records.append(compared("memory", f"peak, {figure}", "MiB", pairs, **more))
    print(f"{'':16s}{'':26s}{'ours, MiB':>24s}{'theirs, MiB':>24s}   theirs / ours")
    for made in records:
        cells = "".join(f"{spread(made[side], '.0f'):>24s}" for side in ("ours", "theirs"))
        ratio = spread(made["ratio"], ".2f")
        print(f"{made['case']:16s}{made['quantity'] + ', ' + made['peer']:26s}{cells}   {ratio}")
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
