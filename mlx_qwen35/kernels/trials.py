"""Small seeded calls of each kernel, as a layer of given sizes makes them, with what they have to equal.

Knows operations and how their arguments look. Knows no layers. Nothing is computed before a trial is judged.
Every call has several rows, tokens or sequences, an odd number of them; nothing here draws from MLX's own random state.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import mlx.core as mx

from . import (
    add_norm,
    angles,
    attention_inputs,
    delta_decode,
    expert_down,
    expert_gate_up,
    norm_matmul,
    ragged_attention,
    router,
)
from .delta_decode.reference import delta_decode as delta_decode_reference
from .trial import Trial
from .weights import Kind, Weights

_EPS = 1e-6
_EXPERTS = 3  # of a stack: how many it has is no part of a kernel
_MXFP4 = 40


class _Random:
    """Arrays from a seed."""

    def __init__(self, seed: int):
        self._keys: Iterator[int] = itertools.count(1000 * seed)

    def normal(self, shape: Sequence[int], dtype: mx.Dtype, *, spread: float = 1.0, middle: float = 0.0) -> mx.array:
        return mx.random.normal(shape, loc=middle, scale=spread, key=mx.random.key(next(self._keys))).astype(dtype)

    def bits(self, shape: Sequence[int]) -> mx.array:
        """uint32; drawn in halves, since MLX draws integers by way of float32."""
        keys = mx.random.key(next(self._keys)), mx.random.key(next(self._keys))
        low, high = (mx.random.randint(0, 1 << 16, shape, key=key).astype(mx.uint32) for key in keys)
        return low | high << 16

    def matrix(self, kind: Kind, experts: int | None = None) -> Weights:
        """Of a kind: one, or a stack of several; the values are of the size that keeps products about 1."""
        stack = () if experts is None else (experts,)
        size = kind.width**-0.5
        if kind.form == 0:
            plain = self.normal((*stack, kind.rows, kind.width), kind.weight, spread=size)
            return Weights(kind, plain, plain, plain)
        bits = 4 if kind.form == _MXFP4 else kind.form
        packed = self.bits((*stack, kind.rows, kind.width * bits // 32))
        groups = (*stack, kind.rows, kind.width // kind.group)
        if kind.form == _MXFP4:
            exponents = 120 + self.bits(groups) % 4
            scales = exponents.astype(mx.uint8)
            return Weights(kind, packed, scales, scales)
        step = size / 2 ** (kind.form - 1)
        scales = self.normal(groups, kind.scales, spread=step / 4, middle=step)
        return Weights(kind, packed, scales, (scales * -(2.0 ** (kind.form - 1))).astype(kind.scales))


def _wide(arrays: Sequence[mx.array]) -> list[mx.array]:
    return [a.astype(mx.float32) if mx.issubdtype(a.dtype, mx.floating) else a for a in arrays]


def of_add_norm(width: int, dtype: mx.Dtype, weight: mx.Dtype) -> Trial:
    """Rows of `width` values in dtype, a norm's weight in another."""

    def arrays() -> list[mx.array]:
        some = _Random(1)
        return [some.normal((3, width), dtype), some.normal((3, width), dtype), some.normal((width,), weight, middle=1)]

    return Trial(
        add_norm._KERNEL,
        {"width": width, "dtype": dtype, "weight": weight},
        lambda: add_norm.add_norm(*arrays(), eps=_EPS),
        lambda: add_norm.reference.add_norm(*_wide(arrays()), eps=_EPS),
    )


def of_norm_matmul(
    dtype: mx.Dtype, norm: mx.Dtype, gate: Kind, up: Kind | None = None, *, rows: int, added: bool
) -> Trial:
    """norm: dtype of its weight; gate, up: kinds of what meets it; added: whether there is a sum to be taken."""
    gate, up = (kind and kind._replace(rows=20) for kind in (gate, up))  # how many outputs is no part of a kernel

    def arguments() -> list[mx.array | Weights | None]:
        some = _Random(10)
        x, more = some.normal((rows, gate.width), dtype), some.normal((rows, gate.width), dtype)
        weight = some.normal((gate.width,), norm, spread=0.3, middle=1)
        return [x, more if added else None, weight, *(kind and some.matrix(kind) for kind in (gate, up))]

    def expected() -> Sequence[mx.array]:
        x, more, weight, *matrices = arguments()
        wide = [array if array is None else array.astype(mx.float32) for array in (x, more, weight)]
        return norm_matmul.reference.norm_matmul(*wide, *matrices, eps=_EPS)

    return Trial(
        norm_matmul._KERNEL,
        {"dtype": dtype, "norm": norm, "kinds": (gate, up), "rows": rows, "added": added},
        lambda: norm_matmul.norm_matmul(*arguments(), eps=_EPS),
        expected,
    )


def of_angles(half: int, factor: float, *, several: bool) -> Trial:
    """half: pairs of values that turn; several: each by one of three positions of a token."""

    def arrays() -> list[mx.array]:
        some = _Random(9)
        tokens = (3, 2, 3) if several else (2, 3)
        positions = (some.bits(tokens) % 1000).astype(mx.int32)
        return [positions, mx.abs(some.normal((half,), mx.float32)), mx.arange(half, dtype=mx.int32) % 3]

    return Trial(
        angles._KERNEL,
        {"half": half, "several": several},
        lambda: angles.angles(*arrays(), factor),
        lambda: angles.reference.angles(*arrays(), factor),
    )


def of_attention_inputs(
    dtype: mx.Dtype, norms: tuple[mx.Dtype, mx.Dtype], *, heads: int, kv_heads: int, dim: int, half: int,
    widths: tuple[int, int], keys_at: int, same: bool,
) -> Trial:  # fmt: skip
    """widths: columns of the arrays with queries and with keys, which are one where keys begin behind queries.

    same: all sequences stand at the same positions.
    """
    one = keys_at > 0

    def arrays() -> list[mx.array]:
        some = _Random(2)
        queries = some.normal((2, 3, widths[0]), dtype)
        keys = queries if one else some.normal((2, 3, widths[1]), dtype)
        angles = some.normal((1 if same else 2, 1, 3, half), mx.float32)
        weights = [some.normal((dim,), norm, spread=0.3, middle=1) for norm in norms]
        return [queries, keys, *weights, mx.cos(angles), mx.sin(angles)]

    how = {"heads": heads, "kv_heads": kv_heads, "eps": _EPS}

    def expected() -> Sequence[mx.array]:
        q, k, *rest = _wide(arrays())
        own = q[..., : heads * 2 * dim], k[..., keys_at : keys_at + kv_heads * dim]
        return attention_inputs.reference.attention_inputs(*own, *rest, **how)

    return Trial(
        attention_inputs._KERNEL,
        {"dtype": dtype, "norms": norms, "heads": (heads, kv_heads, dim, half), "columns": (*widths, keys_at),
         "same": same},
        lambda: attention_inputs.attention_inputs(*arrays(), **how, keys_at=keys_at),
        expected,
    )  # fmt: skip


def of_delta_decode(
    dtype: mx.Dtype, weights: tuple[mx.Dtype, mx.Dtype, mx.Dtype, mx.Dtype], *, key_heads: int, heads: int,
    key_dim: int, value_dim: int, taps: int, widths: tuple[int, int], gates_at: int, most_simds: int,
) -> Trial:  # fmt: skip
    """weights: dtypes of taps, A_log, dt_bias and the norm. widths: columns of the arrays with q, k, v, z and with b
    and a, which begin at `gates_at`; most_simds: as delta_decode takes it."""
    channels = 2 * key_heads * key_dim + heads * value_dim
    tap, rate, bias, norm = weights

    def arrays() -> list[mx.array]:
        some = _Random(3)
        return [
            some.normal((1, 3, widths[0]), dtype), some.normal((1, 3, widths[1]), dtype),
            some.normal((1, taps - 1, channels), dtype), some.normal((channels, taps), tap, spread=0.5),
            some.normal((heads,), rate), some.normal((heads,), bias, middle=-2),
            some.normal((value_dim,), norm, spread=0.3, middle=1),
            some.normal((1, heads, value_dim, key_dim), mx.float32),
        ]  # fmt: skip

    how = {"key_heads": key_heads, "eps": _EPS}

    def expected() -> Sequence[mx.array]:
        mixed, gates, *rest = _wide(arrays())
        own = mixed[..., : channels + heads * value_dim], gates[..., gates_at : gates_at + 2 * heads]
        return delta_decode_reference(*own, *rest, **how)

    return Trial(
        delta_decode._KERNEL,
        {"dtype": dtype, "weights": weights, "heads": (key_heads, heads, key_dim, value_dim, taps),
         "columns": (*widths, gates_at), "most_simds": most_simds},
        lambda: delta_decode.delta_decode(*arrays(), **how, gates_at=gates_at, each=True, most_simds=most_simds),
        expected,
    )  # fmt: skip


# Of three rows: a long one in two pieces, of which one lies in the middle of its array; one and several positions. The
# last array has something of each row, as a tail has. Arrays: rows, capacity.
_SHORT = ((1, 60), (1, 9), (3, 16))
_LONG = ((1, ragged_attention.SPAN + 9), *_SHORT[1:])


def of_ragged_attention(
    dtype: mx.Dtype, *, heads: int, kv_heads: int, dim: int, whole: bool, most_simds: int
) -> Trial:  # fmt: skip
    """whole: no row has more than one span; else what is judged is put together from spans by MLX's operations.
    most_simds: as ragged_attention takes it."""
    arrays = _SHORT if whole else _LONG
    piece = ragged_attention.Piece
    pieces = (
        (piece(0, 0, 4, arrays[0][1] - 4), piece(2, 0, 0, 3)),
        (piece(2, 1, 7, 1),),
        (piece(1, 0, 0, 9), piece(2, 2, 5, 11)),
    )
    plan = ragged_attention.planned(pieces, tuple(capacity for _, capacity in arrays), kv_heads)
    assert plan is not None and plan.whole == whole

    def given() -> tuple[mx.array, list[ragged_attention.Arrays]]:
        some = _Random(7)
        queries = some.normal((3, heads, dim), dtype)
        shapes = [(rows, kv_heads, capacity, dim) for rows, capacity in arrays]
        return queries, [(some.normal(shape, dtype), some.normal(shape, dtype)) for shape in shapes]

    def run() -> list[mx.array]:
        made, ends = ragged_attention.of_spans(*given(), plan, most_simds=most_simds)
        return [made if whole else ragged_attention.reference.together(made, ends, plan.firsts)]

    def expected() -> list[mx.array]:
        return [ragged_attention.reference.ragged_attention(*given(), pieces)]

    settings = {"dtype": dtype, "heads": (heads, kv_heads, dim), "whole": whole, "most_simds": most_simds}
    return Trial(ragged_attention._KERNEL, settings, run, expected)


def of_ragged_sum(dtype: mx.Dtype, *, heads: int, dim: int) -> Trial:
    """Rows of one, three and two spans."""
    one = (ragged_attention.Piece(0, 0, 0, 1),)
    plan = ragged_attention.planned((one, 3 * one, 2 * one), (1,), 1, 1)
    assert plan is not None

    def given() -> tuple[mx.array, mx.array]:
        some = _Random(8)
        shape = (plan.firsts[-1], heads)
        ends = [some.normal(shape, mx.float32, spread=3.0), mx.abs(some.normal(shape, mx.float32)) + 1]
        return some.normal((*shape, dim), mx.float32), mx.stack(ends, axis=-1)

    return Trial(
        ragged_attention._SUM,
        {"dtype": dtype, "heads": (heads, dim)},
        lambda: [ragged_attention.summed(*given(), plan, dtype)],
        lambda: [ragged_attention.reference.together(*given(), plan.firsts)],
    )


def of_router(
    dtype: mx.Dtype, logits: mx.Dtype, num_experts: int, experts_per_token: int, shared_gate: Kind | None
) -> Trial:
    """dtype: of rows; shared_gate: the kind of the matrix that weighs the shared expert; None: it is not asked for."""
    rows = 3

    def arrays() -> tuple[mx.array, mx.array | None, Weights | None]:
        some = _Random(4)
        order = mx.argsort(some.normal((rows, num_experts), mx.float32), axis=-1).astype(mx.float32)
        spread = (order * (12.0 / num_experts) - 6.0).astype(logits)  # distinct in float32; in 16 bits some may tie
        if shared_gate is None:
            return spread, None, None
        return spread, some.normal((rows, shared_gate.width), dtype), some.matrix(shared_gate)

    def dense(ids: mx.array, weights: mx.array) -> list[mx.array]:
        """By expert: which of equal experts comes first is the kernel's own business, and so is their order."""
        chosen = weights[:, :experts_per_token].astype(mx.float32)
        return [mx.sort(chosen, axis=-1), weights[:, experts_per_token:].astype(mx.float32), _logits_of(ids)]

    def _logits_of(ids: mx.array) -> mx.array:
        known = mx.minimum(ids, num_experts - 1)  # what a faulty kernel gives may be any number
        found = mx.take_along_axis(arrays()[0].astype(mx.float32), known, axis=-1)
        return mx.sort(mx.where(ids < num_experts, found, mx.nan), axis=-1)

    def parts(found: tuple[mx.array, mx.array]) -> list[mx.array]:
        return [part for part in dense(*found) if part.size]

    def run() -> list[mx.array]:
        return parts(router.route(arrays()[0], experts_per_token, *arrays()[1:]))

    def expected() -> list[mx.array]:
        values, x, gate = arrays()
        values = values.astype(mx.float32)
        if gate is None:
            return parts(router.reference.route(values, experts_per_token))
        return parts(router.reference.route_with_shared(values, experts_per_token, x, gate.values()))

    settings = {"dtype": dtype, "logits": logits, "experts": (num_experts, experts_per_token), "gate": shared_gate}
    return Trial(router._KERNEL, settings, run, expected)


def _ids(rows: int, slots: int) -> mx.array:
    return (mx.arange(rows * slots, dtype=mx.uint32).reshape(rows, slots) * 2 + 1) % _EXPERTS


def of_expert_gate_up(dtype: mx.Dtype, slots: int, kinds: tuple[Kind, Kind, Kind, Kind], rows: int = 3) -> Trial:
    """kinds: of gate and up of the experts, and of the shared expert."""
    gate, up, shared_gate, shared_up = kinds

    def arguments() -> list[mx.array | Weights]:
        some = _Random(5)
        x = some.normal((rows, gate.width), dtype)
        stacks = [some.matrix(kind, _EXPERTS) for kind in (gate, up)]
        return [x, _ids(rows, slots), *stacks, *(some.matrix(kind) for kind in (shared_gate, shared_up))]

    return Trial(
        expert_gate_up._KERNEL,
        {"dtype": dtype, "slots": slots, "kinds": kinds, "rows": rows},
        lambda: expert_gate_up.gate_up(*arguments()),
        lambda: expert_gate_up.reference.gate_up(*arguments()),
    )


def of_expert_down(dtype: mx.Dtype, slots: int, kinds: tuple[Kind, Kind], rows: int = 3) -> Trial:
    """kinds: of the down projections of the experts, and of the shared expert."""
    down, shared = kinds

    def arguments() -> list[mx.array | Weights]:
        some = _Random(6)
        hidden, beside = some.normal((rows, slots, down.width), dtype), some.normal((rows, shared.width), dtype)
        weights = mx.abs(some.normal((rows, slots + 1), mx.float32))
        return [hidden, beside, _ids(rows, slots), weights, some.matrix(down, _EXPERTS), some.matrix(shared)]

    return Trial(
        expert_down._KERNEL,
        {"dtype": dtype, "slots": slots, "kinds": kinds, "rows": rows},
        lambda: [expert_down.down(*arguments())],
        lambda: [expert_down.reference.down(*arguments())],
    )
