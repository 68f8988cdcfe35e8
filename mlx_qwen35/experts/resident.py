"""The bank whose experts are all in memory, and the sums that a streamed one makes in the same way.

Knows what an expert computes of a row and in which order rows are taken. Knows no router and no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..kernels.activation import swiglu
from ..kernels.expert_down import down
from ..kernels.expert_gate_up import gate_up
from ..kernels.few_rows import MOST_ROWS
from ..kernels.lanes import LEAST_ON_CORES, LEAST_SHARED, in_lanes, on_all_cores, on_one_core, together
from ..kernels.one_row import ROWS
from ..kernels.weights import Projections
from .linear import ExpertLinear, QuantizedExpertLinear

# From this many (row, expert) pairs on, taking them expert by expert pays: each expert is then read once.
SORT_FROM = 64
_EXACT_SORT_FROM = 512  # where `be_exact` was called, on a GPU
_LEAST_PLAIN = 2**20  # values of plain weights that are worth a lane of their own
_FEW_PLAIN = 2**23  # such values, up to which a CPU takes each pair by itself sooner than it has looked at the ids


class Experts(nn.Module):
    """down(silu(gate(x)) * up(x)) of a stack of experts, all of a layer or those in some slots."""

    exact = False

    def be_exact(self) -> None:
        """From now on no bit hangs on how large the stack is, nor in a few rows on the others, on every device.

        Many rows go expert by expert on a GPU too: MLX chooses the kernel of a sorted product by the rows that come to
        an expert of the stack which it is given, so slots may take another than all experts would.
        """
        self.exact = True

    def few(self, expert_ids: mx.array) -> bool:
        """Whether rows with these experts [N, K] go through them each by itself (`pairs`), or sorted by expert.

        On a CPU a few rows always do: a row's bits do not hang on which others there are.
        """
        if _on_cpu():
            plain = isinstance(self.gate_proj, ExpertLinear) and expert_ids.size * self._each() <= _FEW_PLAIN
            return plain or len(expert_ids) <= MOST_ROWS or expert_ids.size < SORT_FROM
        if not self.exact:
            return expert_ids.size < SORT_FROM
        return len(expert_ids) <= ROWS or expert_ids.size < _EXACT_SORT_FROM

    def __init__(self, gate_proj: nn.Module, up_proj: nn.Module, down_proj: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate_proj, up_proj, down_proj

    def pairs(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """x [N, H], expert_ids [N, K] int -> each row through each of its experts, [N, K, H]."""
        kinds = {type(m) for m in (self.gate_proj, self.up_proj, self.down_proj)}
        if len(kinds) > 1 or not (_on_cpu() and self._one_by_one()):
            return self._gathered(x[:, None, None, :], expert_ids, sorted_indices=False).squeeze(-2)
        if kinds == {QuantizedExpertLinear}:
            return self._pairs_by_outputs(x, expert_ids)
        ids, rows = expert_ids.flatten(), mx.repeat(x, expert_ids.shape[1], axis=0)  # [N K], [N K, H]

        def some(pairs: slice) -> mx.array:
            mine = ids[pairs], rows[pairs]
            return self.down_proj.of_each(mine[0], swiglu(self.gate_proj.of_each(*mine), self.up_proj.of_each(*mine)))

        made = in_lanes(some, ids.size, least=-(-_LEAST_PLAIN // self._each()))
        y = made[0] if len(made) == 1 else mx.concatenate(made)
        return y.reshape(*expert_ids.shape, -1)

    def _each(self) -> int:
        """Values of an expert's weights."""
        return 3 * self.gate_proj.input_dims * self.gate_proj.output_dims

    def _pairs_by_outputs(self, x: mx.array, expert_ids: mx.array) -> mx.array:
        """The same in lanes that share the hidden values of all experts, exchange them, and share the outputs."""
        rows, pairs = x[:, None, None, :], expert_ids.size
        hidden, outputs = self.gate_proj.output_dims, self.down_proj.output_dims

        def first(taken: slice) -> mx.array:
            each = (m(rows, expert_ids, sorted_indices=False, taken=taken) for m in (self.gate_proj, self.up_proj))
            return swiglu(*each)

        def second(taken: slice) -> mx.array:
            return self.down_proj(together(parts), expert_ids, sorted_indices=False, taken=taken)

        parts = in_lanes(first, hidden, least=-(-LEAST_SHARED // (2 * pairs * x.shape[-1])))
        made = in_lanes(second, outputs, least=-(-LEAST_SHARED // (pairs * hidden)))
        return together(made).squeeze(-2)

    def mixed(self, x: mx.array, expert_ids: mx.array, weights: mx.array, shared: Projections) -> mx.array:
        """x [N, H], expert_ids [N, K] uint32, weights [N, K + 1] -> sum over K of weight * expert(x), plus the last
        weight * shared(x), [N, H], in two launches. To be called only if `projections` are there."""
        own = self.projections()
        hidden, shared_hidden = gate_up(x, expert_ids, own.gate, own.up, shared.gate, shared.up)
        return down(hidden, shared_hidden, expert_ids, weights, own.down, shared.down)

    def projections(self) -> Projections | None:
        """The three stacks as kernels read them; None where an adapter lies, or a form that they do not know."""
        return Projections.of(self.gate_proj, self.up_proj, self.down_proj)

    def runs(self, rows: mx.array, experts: Sequence[int], counts: Sequence[int]) -> mx.array:
        """rows [R, H], of which the first counts[0] go through experts[0], the next through experts[1], ... -> [R, H].

        On a GPU one sorted product, and nothing is evaluated; the experts must ascend. On the CPU, whose gathered
        product is slow, expert by expert, as many at a time as there are cores, and evaluated; after `be_exact` on a
        GPU too, one after the other.
        """
        if not self._one_by_one():
            ids = mx.array(np.repeat(np.asarray(experts, np.uint32), counts))
            return self._gathered(rows[:, None, :], ids, sorted_indices=True).squeeze(-2)
        ends = list(accumulate(counts, initial=0))
        mx.eval(rows, self.parameters())

        def through(number: int) -> mx.array:
            mine = rows[ends[number] : ends[number + 1]]
            hidden = swiglu(self.gate_proj.of(experts[number], mine), self.up_proj.of(experts[number], mine))
            return self.down_proj.of(experts[number], hidden)

        work = rows.size * self.gate_proj.output_dims
        if not _on_cpu():
            made = [*map(through, range(len(experts)))]
        else:
            made = (on_all_cores if work >= LEAST_ON_CORES else on_one_core)(through, len(experts))
        return mx.concatenate(made)

    def _gathered(self, x: mx.array, expert_ids: mx.array, *, sorted_indices: bool) -> mx.array:
        gate = self.gate_proj(x, expert_ids, sorted_indices=sorted_indices)
        up = self.up_proj(x, expert_ids, sorted_indices=sorted_indices)
        return self.down_proj(swiglu(gate, up), expert_ids, sorted_indices=sorted_indices)

    def _one_by_one(self) -> bool:
        """Whether `runs` may look at values (no gradient is asked for) and gains by it, or has to; not where an adapter
        lies."""
        plain = (ExpertLinear, QuantizedExpertLinear)
        gains = (self.exact or _on_cpu()) and not self.training
        return gains and all(isinstance(m, plain) for m in (self.gate_proj, self.up_proj, self.down_proj))


class ResidentExperts(Experts):
    """All experts of one layer."""

    def __init__(self, num_experts: int, hidden_size: int, intermediate_size: int):
        super().__init__(
            ExpertLinear(num_experts, hidden_size, intermediate_size),
            ExpertLinear(num_experts, hidden_size, intermediate_size),
            ExpertLinear(num_experts, intermediate_size, hidden_size),
        )

    def __call__(
        self, x: mx.array, expert_ids: mx.array, weights: mx.array, beside: Sequence[mx.array] = ()
    ) -> mx.array:
        """x [N, H], expert_ids [N, K] int, weights [N, K] -> sum over K of weight * expert(x), [N, H]."""
        if self.few(expert_ids):
            return weighted_sum(self.pairs(x, expert_ids), weights)
        # pairs in the order of x:      row 0 0 1 1 2 2   expert 5 1 1 4 5 0
        # sorted by expert:             row 2 0 1 1 0 2   expert 0 1 1 4 5 5
        if self._one_by_one():
            found = ByExpert(np.array(expert_ids))
            y = self.runs(x[found.rows(found.experts)], found.experts, found.counts(found.experts))
            y = y[found.places(found.experts)]
        else:
            order = mx.argsort(expert_ids.flatten())
            rows = x[order // expert_ids.shape[1]][:, None, :]  # [N*K, 1, H]
            y = self._gathered(rows, expert_ids.flatten()[order], sorted_indices=True).squeeze(-2)
            y = y[mx.argsort(order)]
        return weighted_sum(y.reshape(*expert_ids.shape, -1), weights)


def _on_cpu() -> bool:
    return mx.default_device().type == mx.cpu


def weighted_sum(y: mx.array, weights: mx.array) -> mx.array:
    """y [N, K, H], weights [N, K] -> [N, H]."""
    return (y * weights[..., None]).sum(axis=-2)


class ByExpert:
    """The pairs of expert_ids [N, K], numbered row by row, taken expert by expert.

    experts: those that occur, ascending. last: the last row that each of them occurs in.
    """

    def __init__(self, expert_ids: np.ndarray):
        self._per_row = expert_ids.shape[1]
        self._order = np.argsort(expert_ids, axis=None, kind="stable")
        experts, starts = np.unique(expert_ids.flatten()[self._order], return_index=True)
        ends = np.append(starts[1:], expert_ids.size)
        self.experts: list[int] = experts.tolist()
        self.last: list[int] = (self._order[ends - 1] // self._per_row).tolist()
        self._spans = dict(zip(self.experts, zip(starts.tolist(), ends.tolist(), strict=True), strict=True))

    def counts(self, experts: Sequence[int]) -> list[int]:
        """How many pairs each of these has."""
        return [end - start for start, end in (self._spans[expert] for expert in experts)]

    def rows(self, experts: Sequence[int]) -> mx.array:
        """The rows of their pairs, expert by expert."""
        return mx.array((self._pairs(experts) // self._per_row).astype(np.uint32))

    def places(self, experts: Sequence[int]) -> mx.array:
        """Where the pairs, by number, are found when all experts are taken in this order."""
        pairs = self._pairs(experts)
        places = np.empty(pairs.size, np.uint32)
        places[pairs] = np.arange(pairs.size, dtype=np.uint32)
        return mx.array(places)

    def _pairs(self, experts: Sequence[int]) -> np.ndarray:
        return np.concatenate([self._order[slice(*self._spans[expert])] for expert in experts])
