"""Several requests at a time: this package beside mlx-lm's and mlx-vlm's batch generators, and beside its last build
that had no engine, on the same weights.

    python benchmarks/batch.py [--case 0.8B-4-layers small-moe demo] [--rows 1 2 4 8 16] [--rounds 3]
                               [--part together alone mixed stall] [--side ours engine before mlx-lm mlx-vlm]
                               [--before COMMIT] [--tokens 16] [--late 2048] [--out FILE]

Each side is a process that has the checkpoint loaded (batch_sides.py); they take turns. Answers are greedy and have the
lengths that are asked for. Parts:

    together  requests of unequal prompts and answers, at most so many rows at a time; when one leaves, the next joins.
              "total": tokens of all answers a second, prompts included. "running": the same while all rows run and no
              prompt is read, of as many requests of equal length as there are rows; the engine reads all prompts
              at once then, as the peers do
    alone     one request after the other: ours and the build before, in many short turns
    mixed     eight rows, long answers and short ones: ours with rows that join, before with its longest row
    stall     seconds between two tokens of rows that run, while a long prompt comes in, and without it

The build before is `git archive` of a commit in a folder for temporary files. It knows no joins: of more requests than
rows it takes as many as go, waits for the longest, and takes the next; ended rows are computed with the others.
Prints a table, and one JSON line a figure (or appends them to FILE), as METHODOLOGY.md describes. Whether all sides
gave the same tokens is in the lines ("same": of how many answers; two logits may tie within rounding).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks import batch_sides, sides  # noqa: E402
from benchmarks.batch_sides import BatchSide, Work  # noqa: E402
from benchmarks.measuring import circumstances, in_turns, spread, summary, write  # noqa: E402

BEFORE = "fa7948a"  # the last commit without an engine
CASES = ("0.8B-4-layers", "small-moe", "demo")
ROWS = (1, 2, 4, 8, 16)
OURS = ("ours", "engine")
PARTS = ("together", "alone", "mixed", "stall")
_QUIET = 16  # gaps between tokens before the long prompt comes
_ENDLESS = 1500  # tokens that a running row is allowed while it comes
_SHORTEST = 4  # tokens of a prompt or an answer

Record = dict[str, Any]


def lengths(count: int, most: int) -> list[int]:
    """Unequal ones from 4 to `most`, always the same, in no order: the multiples of a step that meets all."""
    span = most - _SHORTEST + 1
    return [_SHORTEST + number * 7 % span for number in range(count)]


def work(count: int, most_prompt: int, answers: Sequence[int], ids: int) -> Work:
    """So many requests of unequal prompts; answers: their lengths."""
    sizes = lengths(count, most_prompt)
    tokens = sides.prompt_tokens(sum(sizes), ids)
    found = []
    for size, new in zip(sizes, answers, strict=True):
        found.append((tokens[:size], new))
        tokens = tokens[size:]
    return found


def total(answer: Record, asked: Work) -> float:
    """Tokens a second of all answers, from the first request to the last token."""
    return sum(new for _, new in asked) / answer["seconds"]


def running(answer: Record, asked: Work) -> float:
    """Tokens a second of all rows while all of them run, once all have their first."""
    if answer["stamps"] is None:
        return (sum(new for _, new in asked) - len(asked)) / (answer["seconds"] - answer["prompted"])
    begin = max(row[0] for row in answer["stamps"])
    end = min(row[-1] for row in answer["stamps"])
    if end <= begin:
        raise SystemExit("one answer ended before another began: give longer ones with --tokens")
    return sum(begin < stamp <= end for row in answer["stamps"] for stamp in row) / (end - begin)


class Bench:
    """The sides of one case, and what is asked of them."""

    def __init__(self, case: str, each: dict[str, BatchSide], arguments: argparse.Namespace, ids: int):
        self.case, self.sides, self._arguments, self._ids = case, each, arguments, ids
        self.records: list[Record] = []

    def _ask(
        self, names: Sequence[str], asked: Work, rows: int, rounds: int, hurry: bool = False
    ) -> dict[str, list[Record]]:
        calls = [lambda side=self.sides[name]: side.answers(asked, rows, hurry) for name in names]
        made = in_turns(calls, rounds, warm=0)
        return {name: [turn[place] for turn in made] for place, name in enumerate(names)}

    def _record(self, part: str, quantity: str, rows: int, rates: dict[str, list[float]], **more: Any) -> None:
        """rates: tokens a second of each side, a round each; ratios are ours / theirs, formed round by round."""
        mine = [name for name in OURS if name in rates]
        for other in (name for name in rates if name not in OURS):
            theirs = {
                "benchmark": "batch", "part": part, "quantity": quantity, "case": self.case, "rows": rows,
                "unit": "tokens/s", "peer": other, "theirs": summary(rates[other]), **more,
            }  # fmt: skip
            self.records += [theirs | _against(name, rates[name], rates[other]) for name in mine] or [theirs]
        shown = "  ".join(f"{name} {statistics.median(rate):8.2f}" for name, rate in rates.items())
        print(f"{self.case:14} {part:9} {quantity:8} {rows:2d} rows   {shown}", flush=True)

    def together(self) -> None:
        for rows in self._arguments.rows:
            names = [name for name in self.sides if name != "before" or rows in (1, 8)]
            count = rows + max(1, rows // 2)
            asked = work(count, self._arguments.prompt, lengths(count, self._arguments.tokens), self._ids)
            made = self._ask(names, asked, rows, self._arguments.rounds)
            rates = {name: [total(answer, asked) for answer in answers] for name, answers in made.items()}
            self._record("together", "total", rows, rates, same=_same(made))
            asked = work(rows, 8, [self._arguments.tokens + rows] * rows, self._ids)
            names = [name for name in names if name != "ours"]  # which gives no token before the last
            made = self._ask(names, asked, rows, self._arguments.rounds, hurry=True)
            rates = {name: [running(answer, asked) for answer in answers] for name, answers in made.items()}
            self._record("together", "running", rows, rates, same=_same(made))

    def alone(self) -> None:
        names = [name for name in self.sides if name in (*OURS, "before")]
        asked = work(2, 16, [self._arguments.tokens, 2 * self._arguments.tokens], self._ids)
        made = self._ask(names, asked, 1, 3 * self._arguments.rounds)
        rates = {name: [total(answer, asked) for answer in answers] for name, answers in made.items()}
        self._record("alone", "total", 1, rates, same=_same(made))

    def mixed(self) -> None:
        names = [name for name in self.sides if name in (*OURS, "before")]
        most = 4 * self._arguments.tokens
        answers = [most if number % 4 == 0 else most // 8 + number % 5 for number in range(16)]
        asked = work(16, self._arguments.prompt, answers, self._ids)
        made = self._ask(names, asked, 8, self._arguments.rounds)
        rates = {name: [total(answer, asked) for answer in answers] for name, answers in made.items()}
        self._record("mixed", "total", 8, rates, same=_same(made))

    def stall(self) -> None:
        late = sides.prompt_tokens(self._arguments.late, self._ids)
        names = [name for name in self.sides if name not in ("ours", "before")]  # these two take in nothing meanwhile
        for rows in (1, 7):
            asked = work(rows, 16, [_ENDLESS] * rows, self._ids)
            calls = [lambda side=self.sides[name], asked=asked: side.stall(asked, late, _QUIET) for name in names]
            for name, answers in zip(names, zip(*in_turns(calls, 1, warm=0), strict=True), strict=True):
                (found,) = answers
                gaps = {when: _gaps(found[when]) for when in ("quiet", "busy")}
                times = {each: gaps["busy"][each] / gaps["quiet"][each] for each in gaps["quiet"]}
                self.records.append({
                    "benchmark": "batch", "part": "stall", "case": self.case, "rows": rows, "unit": "s", "side": name,
                    "late": len(late), "first": found["first"], "tokens_meanwhile": len(found["busy"]),
                    **gaps, "ratio": times,
                })  # fmt: skip
                shown = "   ".join(
                    f"{each} {1000 * gaps['busy'][each]:.0f} ms / {1000 * gaps['quiet'][each]:.0f} = {times[each]:.2f}"
                    for each in times
                )
                end = f"prompt {found['first']:.1f} s, {len(found['busy'])} tokens meanwhile"
                print(f"{self.case:14} stall     {rows} rows  {name:8} {shown}   {end}", flush=True)


def _against(name: str, ours: list[float], theirs: list[float]) -> Record:
    return {
        "side": name,
        "ours": summary(ours),
        "ratio": summary(a / b for a, b in zip(ours, theirs, strict=True)),
    }


def _gaps(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    mean = statistics.fmean(ordered)
    p95 = ordered[int(0.95 * (len(ordered) - 1))]
    return {"mean": mean, "median": statistics.median(ordered), "p95": p95, "max": ordered[-1]}


def _same(made: dict[str, list[Record]]) -> float:
    """The part of the requests to which all sides gave the same tokens, in all rounds."""
    each = zip(*(answer["tokens"] for answers in made.values() for answer in answers), strict=True)
    return statistics.mean(all(one == tokens[0] for one in tokens) for tokens in each)


def table(records: Sequence[Record]) -> list[str]:
    """Lines: each figure with its spread, and the ratios."""
    lines = ["", "tokens a second, median [least .. most] of the rounds; ratio: ours / theirs, round by round"]
    for record in records:
        if record["part"] == "stall":
            continue
        place = f"{record['case']:14} {record['part']:9} {record['quantity']:8} {record['rows']:2d}"
        theirs = f"{record['peer']:8} {spread(record['theirs'], '.2f'):26}"
        if "side" in record:
            ours = f"{record['side']:7} {spread(record['ours'], '.2f'):26}"
            lines.append(f"{place}  {ours} {theirs} ratio {spread(record['ratio'], '.2f')}")
        else:
            lines.append(f"{place}  {theirs}")
    return lines


def before(commit: str, cache: Path) -> Path:
    """The folder of another commit of this package."""
    folder = cache / f"before-{commit}"
    if not (folder / "mlx_qwen35").exists():
        folder.mkdir(parents=True, exist_ok=True)
        packed = subprocess.run(["git", "-C", str(CHECKOUT), "archive", commit], capture_output=True)
        if packed.returncode:
            raise SystemExit(f"no commit {commit} to compare with: {packed.stderr.decode()}Leave out --side before.")
        subprocess.run(["tar", "-x", "-C", str(folder)], input=packed.stdout, check=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", nargs="*", choices=[*sides.CASES, "demo"], default=list(CASES))
    parser.add_argument("--rows", nargs="*", type=int, default=list(ROWS))
    parser.add_argument("--part", nargs="*", choices=PARTS, default=list(PARTS))
    parser.add_argument("--side", nargs="*", choices=batch_sides.NAMES, default=list(batch_sides.NAMES))
    parser.add_argument("--before", default=BEFORE, help=f"the commit to compare with ({BEFORE})")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=24, help="the most tokens of a prompt (24)")
    parser.add_argument("--tokens", type=int, default=16, help="the most tokens of an answer (16)")
    parser.add_argument("--late", type=int, default=2048, help="tokens of the prompt that comes in (2048)")
    parser.add_argument("--folder", type=Path, default=sides.CACHE, help="where checkpoints are kept")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    arguments = parser.parse_args()
    around, records = circumstances(), []
    for name in arguments.case:
        records += _measure(name, arguments)
    print(*table(records), sep="\n")
    write(records, around, arguments.out)


def _measure(name: str, arguments: argparse.Namespace) -> list[Record]:
    from mlx_qwen35.library import demo_folder

    folder = demo_folder() if name == "demo" else sides.checkpoint(sides.CASES[name], arguments.folder)
    with ExitStack() as stack:
        each = {}
        for side in arguments.side:
            checkout = before(arguments.before, arguments.folder) if side == "before" else None
            each[side] = stack.enter_context(BatchSide(side, folder, checkout))
        bench = Bench(name, each, arguments, 1000 if name == "demo" else 30000)
        for side in each.values():  # a warm-up that is thrown away
            for rows in (1, 2):
                side.answers(work(2, 8, [4, 4], 900), rows)
        parts: dict[str, Callable[[], None]] = {part: getattr(bench, part) for part in PARTS}
        for part in arguments.part:
            parts[part]()
    return bench.records


if __name__ == "__main__":
    main()
