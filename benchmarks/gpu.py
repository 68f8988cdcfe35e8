"""One command for a machine with a GPU: are the kernels right there, and how fast is everything?

    python benchmarks/gpu.py [--quick] [--results FOLDER] [--dry-run]

On a Mac or an NVIDIA machine, in this order, each into FOLDER (benchmarks/results/gpu-<machine>):

    correct   the tests of the kernels, the layers and the model, which take the real GPU where there is one: every
              kernel against its plain MLX reference at unequal sizes (pytest; extra `test`)
    probe     bandwidth of copying, and the time between two small operations that wait for one another: the two numbers
              that roofline.py had to assume
    kernels, decode, prefill, memory, startup     beside mlx-lm, where it is installed

A benchmark is not run where `correct` found a mistake: a speed on a red test is not reported. Without a GPU it says so
and does nothing; --dry-run prints what would be run, anywhere. Knows how the others are called, and two probes.
It was written without a GPU at hand: only the refusal, the dry run and the probes' arithmetic have been run.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

import mlx.core as mx  # noqa: E402

from benchmarks.measuring import RESULTS, circumstances, in_turns, installed, summary, write  # noqa: E402

TESTS = ("tests/kernels", "tests/layers", "tests/model/test_model.py")
LARGE = "35B-8-layers"  # 3.9 GB
NO_GPU = (
    "MLX has no GPU here: its default device is the CPU. On a Mac with Apple silicon this runs as it is; on an NVIDIA "
    "machine install the extra `cuda`. (--dry-run shows what it would do; make bench measures the CPU.)"
)


def commands(results: Path, quick: bool) -> list[tuple[str, list[str]]]:
    """(name, command) of each step that is a process of its own."""
    python, lines = sys.executable, str(results / "lines.jsonl")
    cases = ["small-moe"] if quick else ["0.8B", LARGE]
    rounds = "2" if quick else "5"
    steps = [("correct", [python, "-m", "pytest", "-q", *TESTS])]
    if installed("mlx-lm") is None:
        print("mlx-lm is not installed, so nothing is measured beside it: pip install mlx-lm")
        return steps
    for name, more in (
        ("kernels", ["--case", "35B-4-layers", "0.8B-8-layers", "--rows", "1", "4", "512"]),
        ("decode", ["--case", *cases, "--prompt", "512", "--tokens", "128"]),
        ("prefill", ["--case", *cases, "--tokens", "2048"]),
        ("memory", ["--case", *cases, "--prompt", "2048"]),
    ):
        steps.append((name, [python, f"benchmarks/{name}.py", *more, "--rounds", rounds, "--out", lines]))
    return [*steps, ("startup", [python, "benchmarks/startup.py", "--repeats", rounds, "--out", lines])]


def bandwidth(nbytes: int, rounds: int) -> dict[str, float]:
    """GB/s of reading and writing an array of so many bytes."""
    source = mx.zeros((nbytes // 4,), mx.float32)
    mx.eval(source)

    def copy() -> float:
        start = time.perf_counter()
        mx.eval(source + 1)
        return 2 * source.nbytes / 1e9 / (time.perf_counter() - start)

    return summary(gigabytes for (gigabytes,) in in_turns([copy], rounds))


def gap(operations: int, rounds: int) -> dict[str, float]:
    """Seconds an operation, of a chain of which each needs the one before and computes next to nothing.

    As a model meets it: MLX's own work for an operation is in it, where the GPU does not hide it.
    """
    start_value = mx.ones((1024,))
    mx.eval(start_value)

    def chain() -> float:
        start, x = time.perf_counter(), start_value
        for _ in range(operations):
            x = mx.fast.rms_norm(x, None, 1e-6)  # nothing fuses with it
        mx.eval(x)
        return (time.perf_counter() - start) / operations

    return summary(seconds for (seconds,) in in_turns([chain], rounds))


def probe(nbytes: int, operations: int, rounds: int) -> list[dict[str, Any]]:
    """What roofline.py assumes, as records."""
    measured = {"bandwidth, GB/s": bandwidth(nbytes, rounds), "gap, s an operation": gap(operations, rounds)}
    return [{"benchmark": "probe", "quantity": name, "found": found} for name, found in measured.items()]


def folder_name(machine: str) -> str:
    """A machine's words as part of a file name."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", machine.split(",")[0].lower()).strip("-")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small model and two rounds")
    parser.add_argument("--results", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    arguments = parser.parse_args()
    around = circumstances()
    results = arguments.results or RESULTS / folder_name(str(around["machine"]))
    if arguments.dry_run:
        print(*(f"{name}: {shlex.join(command)}" for name, command in commands(results, arguments.quick)), sep="\n")
        return 0
    if mx.default_device() != mx.gpu:
        print(NO_GPU, file=sys.stderr)
        return 2
    results.mkdir(parents=True, exist_ok=True)
    (name, check), *measured = commands(results, arguments.quick)
    print(f"{name}: {shlex.join(check)}", flush=True)
    if subprocess.run(check, cwd=CHECKOUT).returncode:
        print("the kernels or the model are not right on this GPU (above): nothing is measured", file=sys.stderr)
        return 1
    write(probe(1 << 30, 2000, 5), around, results / "lines.jsonl")
    failed = []
    for name, command in measured:
        print(f"\n{name}", flush=True)
        if subprocess.run(command, cwd=CHECKOUT).returncode:
            failed.append(name)
    print(f"\n{results / 'lines.jsonl'}" + (f"; failed: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
