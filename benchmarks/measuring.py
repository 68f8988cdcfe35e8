"""What every benchmark does: take turns, sum up, and say on what machine and with what code a figure was made.

Knows clocks, versions and Git. Knows nothing of what is measured.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from mlx_qwen35.machine.system import processor_name

CHECKOUT = Path(__file__).resolve().parents[1]
RESULTS = CHECKOUT / "benchmarks/results"

T = TypeVar("T")


def in_turns(sides: Sequence[Callable[[], T]], rounds: int, warm: int = 1) -> list[tuple[T, ...]]:
    """What the sides returned, in their order, a tuple a round; `warm` rounds go before and are thrown away.

    Who goes first changes from round to round.
    """
    kept = []
    for number in range(warm + rounds):
        order = range(len(sides)) if number % 2 else range(len(sides) - 1, -1, -1)
        made = {index: sides[index]() for index in order}
        if number >= warm:
            kept.append(tuple(made[index] for index in range(len(sides))))
    return kept


def summary(values: Iterable[float]) -> dict[str, float]:
    """Median, least and most."""
    values = list(values)
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def spread(of: Mapping[str, float], form: str = ".3f") -> str:
    """summary() as text: median [least .. most]."""
    return f"{of['median']:{form}} [{of['min']:{form}} .. {of['max']:{form}}]"


def installed(name: str) -> str | None:
    """The version of a package, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _openblas() -> str | None:
    """The processor for which OpenBLAS computes, None where another BLAS does."""
    name = getattr(ctypes.CDLL(None), "openblas_get_corename", None)
    if name is None:
        return None
    name.restype = ctypes.c_char_p
    return name().decode()


def circumstances() -> dict[str, object]:
    """What a figure is worth nothing without."""
    import mlx.core as mx

    git = ["git", "-C", str(CHECKOUT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.splitlines()
    dirty = [line for line in changed if "benchmarks/results/" not in line]  # what a benchmark writes is no change
    processor = processor_name() or "a processor without a name"
    return {
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}",
        "device": "gpu" if mx.default_device() == mx.gpu else "cpu",
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "mlx": installed("mlx"),
        "mlx_lm": installed("mlx-lm"),
        "mlx_vlm": installed("mlx-vlm"),
        "openblas": _openblas(),
        "commit": commit + ("+changes" if dirty else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def compared(
    benchmark: str, quantity: str, unit: str, pairs: Sequence[tuple[float, float]], **more: Any
) -> dict[str, Any]:
    """A record of (ours, theirs) a round; its ratio is theirs / ours, formed round by round."""
    return {
        "benchmark": benchmark,
        "quantity": quantity,
        "unit": unit,
        "rounds": len(pairs),
        "ours": summary(a for a, _ in pairs),
        "theirs": summary(b for _, b in pairs),
        "ratio": summary(b / a for a, b in pairs),
        **more,
    }


def write(records: Iterable[Mapping[str, Any]], around: Mapping[str, Any], out: Path | None) -> None:
    """Print one JSON line a record, and append them to `out` where it is given."""
    lines = [json.dumps({**record, **around}) for record in records]
    print(*lines, sep="\n")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a") as file:
            print(*lines, sep="\n", file=file)
