"""How long a prompt takes until the first token: this package beside mlx-lm (and mlx-vlm), on the same checkpoint.

    python benchmarks/prefill.py [--case 0.8B-8-layers small-moe] [--tokens 512] [--rounds 3] [--peer mlx-lm mlx-vlm]

Every side is a process that has the checkpoint loaded; they take turns with the same prompt (sides.py), after a short
one that is not counted. Knows nothing of how any of them works.
Prints a table, and one JSON line per case and peer, as METHODOLOGY.md describes.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

from benchmarks import sides  # noqa: E402
from benchmarks.measuring import circumstances, compared, in_turns, spread, write  # noqa: E402

WARM = {"prompt": 16, "new": 2}


def measure(case: sides.Case, peers: list[str], folder: Path, rounds: int, tokens: int, new: int) -> list[tuple]:
    """The answers of all sides, a tuple a round, ours first."""
    checkpoint = sides.checkpoint(case, folder)
    with ExitStack() as stack:
        running = [stack.enter_context(sides.Side(name, checkpoint)) for name in ("ours", *peers)]
        for side in running:
            side.ask(**WARM)
        return in_turns([lambda s=side: s.ask(tokens, new) for side in running], rounds, warm=0)


def against_peers(benchmark: str, quantity: str, case: sides.Case, peers: list[str], rounds: list[tuple], of: Any):
    """A record for each peer; of(answer): the seconds that are compared."""
    for number, peer in enumerate(peers, 1):
        pairs = [(of(answers[0]), of(answers[number])) for answers in rounds]
        same = all(answers[0]["tokens"] == answers[number]["tokens"] for answers in rounds)
        apart = sides.apart([rounds[0][0], rounds[0][number]])
        more = {"case": case.name, "cut": case.cut, "peer": peer, "same_tokens": same, "apart": apart}
        yield compared(benchmark, quantity, "s", pairs, **more)


def table(records: list[dict[str, Any]]) -> list[str]:
    """Lines: seconds of both sides and their ratio, and how far apart what they computed is."""
    lines = [f"{'':16s}{'':30s}{'ours':>28s}{'theirs':>28s}   theirs / ours"]
    for made in records:
        cells = f"{spread(made['ours']):>28s}{spread(made['theirs']):>28s}   {spread(made['ratio'], '.2f')}"
        lines.append(f"{made['case']:16s}{made['quantity'] + ', ' + made['peer']:30s}{cells}")
        if not made["same_tokens"]:
            lines.append(f"    the sides chose different tokens; log probabilities differ by {made['apart']:.1e} of 1")
    return lines


def main() -> None:
    parser = sides.arguments(__doc__.splitlines()[0], 3, ("0.8B-8-layers", "small-moe"))
    parser.add_argument("--tokens", type=int, default=512, help="of the prompt (512)")
    arguments = parser.parse_args()
    around = circumstances()
    records: list[dict[str, Any]] = []
    for name in arguments.case:
        case = sides.CASES[name]
        rounds = measure(case, arguments.peer, arguments.folder, arguments.rounds, arguments.tokens, 1)
        quantity = f"prefill {arguments.tokens}"
        records += against_peers("prefill", quantity, case, arguments.peer, rounds, lambda answer: answer["first"])
    print(*table(records), sep="\n")
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
