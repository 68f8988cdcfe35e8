"""Kernels of our own: one body for Metal and CUDA, and which of the two, if any, this process runs them on.

Knows how MLX takes a kernel's text. Knows no operation. An operation asks `on_gpu()` and falls back to its reference.
Rules for bodies, so that one text serves both and the emulator of the tests: docs/KERNELS.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from .cuda_text import CUDA_NAMES, cuda_body

FOLDER = Path(__file__).parent


@dataclass(frozen=True)
class Backend:
    """What makes kernels. make: takes what mx.fast.metal_kernel takes (name, input_names, output_names, source, header)
    and returns what that returns."""

    name: str
    make: Callable[..., Callable[..., list[mx.array]]]


def _make_cuda(**parts: Any) -> Callable[..., list[mx.array]]:
    parts |= {"source": cuda_body(parts["source"]), "header": CUDA_NAMES + cuda_body(parts["header"])}
    return mx.fast.cuda_kernel(**parts)


METAL = Backend("metal", mx.fast.metal_kernel)
CUDA = Backend("cuda", _make_cuda)


def _found() -> Backend | None:
    if mx.default_device().type != mx.gpu:
        return None
    return METAL if mx.metal.is_available() else CUDA


_chosen = _found()


def on_gpu() -> bool:
    """Whether kernels run: the default device was a GPU at import, or `using` says so."""
    return _chosen is not None


def current() -> Backend | None:
    """What kernels run on; None: nothing, references take their place."""
    return _chosen


@contextmanager
def using(backend: Backend | None) -> Iterator[None]:
    """Inside: kernels of this backend, or none. For tests, and for tracing a step on a machine that cannot run it:
    with METAL, on Linux, kernels can be called inside mx.export_function, but not evaluated."""
    global _chosen
    before, _chosen = _chosen, backend
    try:
        yield
    finally:
        _chosen = before


@dataclass(frozen=True, eq=False)
class Kernel:
    """One kernel. body: a file under kernels/; helpers: files with what it calls, put before it.

    Inputs and outputs are arrays whose names the body uses as pointers; rows are contiguous.
    """

    name: str
    inputs: Sequence[str]
    outputs: Sequence[str]
    body: str
    helpers: Sequence[str] = ()
    _made: dict[Backend, Callable[..., list[mx.array]]] = field(default_factory=dict)

    @property
    def source(self) -> str:
        return (FOLDER / self.body).read_text()

    @property
    def header(self) -> str:
        return "".join((FOLDER / helper).read_text() for helper in self.helpers)

    def __call__(
        self,
        inputs: Sequence[mx.array],
        outputs: Sequence[tuple[Sequence[int], mx.Dtype]],
        constants: Mapping[str, int | bool | mx.Dtype],
        *,
        groups: tuple[int, int, int],
        threads: tuple[int, int, int],
    ) -> list[mx.array]:
        """outputs: shape and dtype of each. constants: template arguments; every dtype that varies has to be among
        them: MLX tells CUDA kernels apart by these alone. groups: threadgroups in the grid; threads: in each of them.
        """
        backend = _chosen
        assert backend is not None, "ask on_gpu() first"
        made = self._made.get(backend)
        if made is None:
            made = self._made[backend] = backend.make(
                name=self.name,
                input_names=list(self.inputs),
                output_names=list(self.outputs),
                source=self.source,
                header=self.header,
            )
        shapes, dtypes = zip(*outputs, strict=True)
        return made(
            inputs=list(inputs),
            template=list(constants.items()),
            grid=tuple(g * t for g, t in zip(groups, threads, strict=True)),
            threadgroup=threads,
            output_shapes=[tuple(shape) for shape in shapes],
            output_dtypes=list(dtypes),
        )
