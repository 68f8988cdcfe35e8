"""A kernel held against its reference on a few small arrays: what a GPU is asked before a model relies on it.

Knows how a result is judged: it compiles, it runs, every value is there and near the reference's, and nothing is
written behind the outputs. Knows no operation; trials.py has the calls.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import mlx.core as mx

from .backend import Backend, Kernel, current, using

# Of the reference's largest value. A GPU may compute the reference's float32 products in TF32, and bfloat16 rounds.
TOLERANCE = 5e-3


@dataclass(frozen=True)
class Trial:
    """One call of one kernel. run: the operation as layers call it; expected: the same by MLX's operations, float32.

    settings: what tells this call's instantiation of the kernel from others: sizes, dtypes, forms of weights.
    """

    kernel: Kernel
    settings: Mapping[str, Any]
    run: Callable[[], Sequence[mx.array]] = field(compare=False)
    expected: Callable[[], Sequence[mx.array]] = field(compare=False)

    @property
    def key(self) -> str:
        """Name, settings and a hash of the text: another text is another kernel."""
        said = json.dumps({name: str(value) for name, value in self.settings.items()}, sort_keys=True)
        return f"{self.kernel.name} {_hash_of_text(self.kernel)} {said}"


@lru_cache(maxsize=64)
def _hash_of_text(kernel: Kernel) -> str:
    return hashlib.sha256((kernel.source + "\0" + kernel.header).encode()).hexdigest()[:16]


def judge(trial: Trial) -> str | None:
    """What is wrong with a kernel, in words; None: nothing. Runs it once, on outputs that were NaN before."""
    backend = current()
    assert backend is not None, "there is no GPU"
    guarded = _guarded(backend)
    guarded.behind.clear()
    try:
        with using(guarded.backend):
            found = list(trial.run())
            mx.eval(found, guarded.behind)
        with using(None):
            expected = list(trial.expected())
            mx.eval(expected)
    except Exception as error:  # compilers, drivers and limits raise what they like
        return f"{type(error).__name__}: {str(error).strip() or 'no word why'}".splitlines()[0][:300]
    if any(not bool(_untouched(guard)) for guard in guarded.behind):
        return "it writes behind its outputs"
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        wrong = _difference(ours, theirs)
        if wrong is not None:
            return f"output {number}: {wrong}"
    return None


def _difference(found: mx.array, expected: mx.array) -> str | None:
    if found.shape != expected.shape:
        return f"shape {found.shape}, not {expected.shape}"
    if not mx.issubdtype(found.dtype, mx.floating):
        count = int((found.astype(mx.int64) != expected.astype(mx.int64)).sum())
        return f"{count} of {found.size} numbers are others" if count else None
    ours, theirs = found.astype(mx.float32), expected.astype(mx.float32)
    missing = int((~mx.isfinite(ours)).sum())
    if missing:
        return f"{missing} of {found.size} values are NaN or infinite"
    error = float(mx.abs(ours - theirs).max() / mx.maximum(mx.abs(theirs).max(), 1e-30))
    return f"off by {error:.1e} of the largest value" if error > TOLERANCE else None


def _untouched(guard: mx.array) -> mx.array:
    """Whether what lies behind an output is what it was: NaN, or in integers what the farthest of them is."""
    if mx.issubdtype(guard.dtype, mx.floating):
        return mx.isnan(guard).all()
    return (guard == guard.flatten()[-1]).all()


@dataclass(frozen=True, eq=False)
class _Guarded:
    """A backend whose kernels get outputs that are longer than they know. behind: those ends, of calls since then."""

    backend: Backend
    behind: list[mx.array]


@lru_cache(maxsize=8)
def _guarded(backend: Backend) -> _Guarded:
    behind: list[mx.array] = []

    def make(**parts: Any) -> Callable[..., list[mx.array]]:
        made = backend.make(**parts)

        def call(*, output_shapes: list[tuple[int, ...]], **how: Any) -> list[mx.array]:
            longer = [(2 * shape[0], *shape[1:]) for shape in output_shapes]
            outputs = made(output_shapes=longer, init_value=float("nan"), **how)
            behind.extend(each[shape[0] :] for each, shape in zip(outputs, output_shapes, strict=True))
            return [each[: shape[0]] for each, shape in zip(outputs, output_shapes, strict=True)]

        return call

    return _Guarded(Backend(backend.name, make), behind)
