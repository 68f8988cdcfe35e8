"""Every benchmark that is quick enough to run together, and what they found as a table and plots. `make bench` runs it.

    python benchmarks/bench.py [--only decode launches ...] [--report] [--results FOLDER]

Each is a process with a limit of time; one that does not end is stopped, and the table says so. All limits together are
fifty minutes; on a quiet 2-core Linux machine it takes about a third of that. In FOLDER (benchmarks/results) are then

    bench.jsonl     the lines that they printed; with --only the others stay as they were
    bench.md        a table of them
    bench-*.png     plots, where matplotlib is installed (extra `plots`)

--report only makes the table and the plots again. Knows how the benchmarks are called. Knows nothing of what they find.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks import report  # noqa: E402
from benchmarks.measuring import RESULTS  # noqa: E402


@dataclass(frozen=True)
class Step:
    """One benchmark: its file, how it is called, and the seconds after which it is stopped."""

    name: str
    options: tuple[str, ...]
    limit: float


STEPS = (
    Step("launches", (), 120),
    Step("roofline", (), 120),
    Step("startup", ("--repeats", "5"), 240),
    Step("kernels", ("--rounds", "3"), 420),
    Step("decode", ("--rounds", "3"), 600),
    Step("prefill", ("--rounds", "3"), 900),
    Step("memory", (), 450),
)


def run(step: Step, out: Path) -> str | None:
    """Run a benchmark, which appends its lines to `out`. Returns what went wrong, or None."""
    command = [sys.executable, str(CHECKOUT / "benchmarks" / f"{step.name}.py"), *step.options, "--out", str(out)]
    process = subprocess.Popen(command, cwd=CHECKOUT, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        status = process.wait(step.limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
        process.wait()
        return f"stopped: it had not ended after {step.limit:.0f} s"
    return f"left with status {status}" if status else None


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def main() -> None:
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    parser.add_argument("--report", action="store_true", help="run nothing; make the table and the plots again")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    file = arguments.results / "bench.jsonl"
    records = read(file)
    for step in STEPS if not arguments.report else ():
        if step.name not in arguments.only:
            continue
        print(f"{step.name} (at most {step.limit:.0f} s) ...", end=" ", flush=True)
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            lines = Path(folder) / "lines"
            trouble = run(step, lines)
            made = read(lines)
        if trouble:
            made.append({"benchmark": step.name, "trouble": trouble})
        records = [record for record in records if record["benchmark"] != step.name] + made
        print(trouble or f"{time.monotonic() - start:.0f} s")
        arguments.results.mkdir(parents=True, exist_ok=True)
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
    (arguments.results / "bench.md").write_text(report.markdown(records))
    print(f"{arguments.results / 'bench.md'}")
    if not report.draw(records, arguments.results):
        print("no plots: pip install matplotlib")


if __name__ == "__main__":
    main()
