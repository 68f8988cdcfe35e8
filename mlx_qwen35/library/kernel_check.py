"""Kernels are tried once on a GPU before a model relies on them, and what fails is left to MLX's operations.

Knows when that is: as a model is loaded, for its own sizes and forms, and only what no file remembers for this GPU and
these versions. Knows no operation. Where there is no GPU nothing is done.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.kernels import verdicts
from mlx_qwen35.kernels.backend import current
from mlx_qwen35.kernels.trial import Trial, judge
from mlx_qwen35.layers.trials import Use, uses

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.model.mtp import MTPHead


class KernelWarning(Qwen35Warning):
    """A kernel was switched off."""


def check_kernels(model: Model | MTPHead, *, wanted: bool = True, file: Path | None = None) -> dict[str, str | None]:
    """Decide which kernels a model or a drafting head takes, before it is used.

    wanted: False switches all off. file: where verdicts are kept; None: in the user's cache.
    Returns what was found of each kernel that it asks for: name -> what is wrong, None: nothing. One KernelWarning
    names those that were switched off.
    """
    backend = current()
    if backend is None:
        return {}
    asked = list(uses(model))
    if not wanted:
        for use in asked:
            use.module.unfused = True
        return {}
    file, holder = file or verdicts.verdict_file(), verdicts.identity(backend)
    bench = _Bench(verdicts.read(file, holder))
    wrong: dict[str, str] = {}
    for use in asked:
        wrong = _decided(use, bench) | wrong
    if bench.new:
        verdicts.remember(file, holder, bench.new)
    if wrong:
        told = "; ".join(f"{name}: {why}" for name, why in sorted(wrong.items()))
        warnings.warn(
            f"a kernel is not right on this GPU and is switched off; MLX's operations do its work, slower ({told}). "
            f"Please report it, with what `mlx-qwen35 doctor` prints. It is remembered in {file}",
            KernelWarning,
            stacklevel=3,
        )
    return {name: wrong.get(name) for name in bench.names}


class _Bench:
    """Verdicts, by asking each trial once. new: those that no file had; names: kernels that were asked for."""

    def __init__(self, known: verdicts.Verdicts):
        self._known = dict(known)
        self._keys: dict[Trial, str] = {}
        self.new: verdicts.Verdicts = {}
        self.names: dict[str, None] = {}

    def __call__(self, trial: Trial) -> str | None:
        key = trial.key
        self.names[trial.kernel.name] = None
        if key not in self._known:
            why = self._known[key] = judge(trial)
            if why is None or "memory" not in why.lower():  # which may be free the next time
                self.new[key] = why
        return self._known[key]


def _decided(use: Use, bench: _Bench) -> dict[str, str]:
    """Have a module take the first of its forms that is right; -> kernels that it does not take, and what is wrong."""
    found: dict[str, str] = {}
    for needed, take in use.forms:
        faults = _faults(needed, bench)
        if not faults:
            take()
            use.module.unfused = False
            taken = {trial.kernel.name for trial in needed}
            return {name: why for name, why in found.items() if name not in taken}
        found |= faults
    use.module.unfused = True
    return found


def _faults(needed: Sequence[Trial], bench: _Bench) -> dict[str, str]:
    return {trial.kernel.name: why for trial in reversed(needed) if (why := bench(trial)) is not None}
