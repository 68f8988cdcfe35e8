"""Linear maps of one input as one product: side by side in memory where they are quantized alike, apart by name.

Knows weights. Does not know what the maps mean.
The maps keep their weights, which become views of the joined ones: files, adapters and training see them as ever, and
nothing is in memory twice. Once a map is another (an adapter around it, weights updated) each goes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from ..kernels.backend import on_gpu
from ..kernels.few_rows import unpacks
from ..kernels.quantized_matmul import rows_alone
from ..kernels.weights import Weights, weights_of
from .linear import is_bare
from .summed import Summed, array_of

_LEAVES = ("weight", "scales", "biases")


@dataclass
class Run:
    """Neighbouring maps that are joined. first: the number of the first of them; widths: their outputs.

    arrays: of all together; parts: of each map, the views of `arrays` that it holds.
    """

    first: int
    widths: list[int]
    arrays: list[mx.array]
    parts: list[list[mx.array]]
    _found: Weights | None = None

    def readable(self, first: nn.Module) -> Weights | None:
        """The joined matrix as kernels read it; None if they do not. first: the first of the maps."""
        if weights_of(first) is None:
            return None
        if self._found is None:
            how = {"group_size": first.group_size, "bits": first.bits, "mode": first.mode}
            self._found = Weights.of(*self.arrays, **how)
        return self._found


class Joined:
    """How some maps of one input are joined; made once their weights are there."""

    def __init__(self, maps: Sequence[nn.Module]):
        """maps: those of a layer in the order in which their results shall lie. Nothing is evaluated."""
        self.runs: list[Run] = []
        first = 0
        while first < len(maps):
            count = 1
            while first + count < len(maps) and _alike(maps[first], maps[first + count]):
                count += 1
            if count > 1:
                self.runs.append(_join(maps[first : first + count], first))
            first += count

    def __call__(self, x: mx.array | Summed, maps: Sequence[nn.Module]) -> list[tuple[mx.array, int]]:
        """x [.., in], or what is to be its norm -> for each map an array [.., columns] and the column in it where
        the map's result begins.

        Joined maps share one array. On the CPU that is for few rows and small maps only: results with gaps are slow to
        go on with, and a product of many outputs has another form than those of few (kernels/few_rows).
        """
        runs = {run.first: run for run in self._unchanged(maps)}
        if not on_gpu():
            x = array_of(x)
            runs = {first: run for first, run in runs.items() if _alike_on_cpu(x, run, maps[first])}
        found: list[tuple[mx.array, int]] = []
        while len(found) < len(maps):
            run = runs.get(len(found))
            number = len(found)
            product = None
            if isinstance(x, Summed):
                product = x.through(weights_of(maps[number]) if run is None else run.readable(maps[number]))
            if run is None:
                found.append((maps[number](array_of(x)) if product is None else product, 0))
                continue
            if product is None:
                product = maps[number].product(maps[number].turned(array_of(x)), *run.arrays)
            column = 0
            for width in run.widths:
                found.append((product, column))
                column += width
        return found

    def places(self, maps: Sequence[nn.Module], widths: Sequence[int]) -> list[tuple[int, int, int]]:
        """For each map, of `widths` outputs: which array its result for few rows lies in, how many columns that array
        has, and the column in it where the result begins."""
        found: list[tuple[int, int, int]] = []
        runs = {run.first: run for run in self._unchanged(maps)}
        while (number := len(found)) < len(maps):
            run = runs.get(number)
            taken = [widths[number]] if run is None else run.widths
            found += [(number, sum(taken), sum(taken[:place])) for place in range(len(taken))]
        return found

    def readable(self, maps: Sequence[nn.Module]) -> list[Weights]:
        """The matrices of the products that there are, those that kernels read."""
        runs = {run.first: run for run in self._unchanged(maps)}
        found, number = [], 0
        while number < len(maps):
            run = runs.get(number)
            found.append(weights_of(maps[number]) if run is None else run.readable(maps[number]))
            number += 1 if run is None else len(run.widths)
        return [weights for weights in found if weights is not None]

    def _unchanged(self, maps: Sequence[nn.Module]) -> list[Run]:
        """The runs whose maps hold what was joined. Others are forgotten, so that their arrays do not stay."""
        kept = [
            run
            for run in self.runs
            if all(
                all(module.get(leaf) is part for leaf, part in zip(_LEAVES, parts, strict=False))
                for module, parts in zip(maps[run.first :], run.parts, strict=False)
            )
        ]
        if len(kept) < len(self.runs):
            self.runs = kept
        return kept


class JoinedInputs:
    """What a layer needs to have Joined projections: `self._joined(x, self.joinable())`."""

    _joined = Joined(())  # as long as nothing is joined

    def joinable(self) -> list[nn.Module]:
        """The maps that meet the same input, in the order in which their results shall lie."""
        raise NotImplementedError

    def join(self) -> None:
        """Put them side by side in memory, once they have their weights; lazy."""
        self._joined = Joined(self.joinable())


def columns(results: Sequence[tuple[mx.array, int]], widths: Sequence[int]) -> list[mx.array]:
    """What Joined gave, cut: each map's own result [.., out]."""
    return [
        array if array.shape[-1] == width else array[..., column : column + width]
        for (array, column), width in zip(results, widths, strict=True)
    ]


def neighbours(results: Sequence[tuple[mx.array, int]]) -> tuple[mx.array, int]:
    """Two results as one array in which the second follows the first, and the column of the first.

    In two arrays the first is the last of its own, and the second begins the other.
    """
    (first, column), (second, _) = results
    return (first, column) if first is second else (mx.concatenate([first[..., column:], second], axis=-1), 0)


def _alike_on_cpu(x: mx.array, run: Run, first: nn.Module) -> bool:
    """Whether the joined product of x [.., in] has the bits of each map's own, and is no slower."""
    few = x.size // x.shape[-1] <= rows_alone(first.bits, first.mode)
    return few and not unpacks(x, sum(run.widths), bits=first.bits, mode=first.mode)


def _alike(one: nn.Module, other: nn.Module) -> bool:
    def form(module: nn.Module) -> tuple[object, ...]:
        leaves = [module.get(leaf) for leaf in _LEAVES]
        turned = module.block, id(module.get("signs"))
        packed = (a is not None and (a.dtype, a.shape[1:]) for a in leaves)
        return module.bits, module.group_size, module.mode, turned, *packed

    return is_bare(one) and is_bare(other) and form(one) == form(other)


def _join(maps: Sequence[nn.Module], first: int) -> Run:
    leaves = [leaf for leaf in _LEAVES if maps[0].get(leaf) is not None]
    arrays = [mx.concatenate([module[leaf] for module in maps]) for leaf in leaves]
    run = Run(first, [module.weight.shape[0] for module in maps], arrays, [])
    run.parts = _share(run, maps)
    return run


def _share(run: Run, maps: Sequence[nn.Module]) -> list[list[mx.array]]:
    parts, row = [], 0
    for module, width in zip(maps, run.widths, strict=True):
        views = [array[row : row + width] for array in run.arrays]
        for leaf, view in zip(_LEAVES, views, strict=False):
            module[leaf] = view
        parts.append(views)
        row += width
    return parts
