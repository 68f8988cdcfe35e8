"""Calls so large that their elements are more than 32 bits count: the last row is what it is alone.

The emulator runs the last threadgroups alone, on address space of which only that row is memory.
"""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.kernels import expert_down, expert_gate_up, router
from mlx_qwen35.kernels.add_norm import add_norm
from mlx_qwen35.kernels.add_norm.reference import add_norm as add_norm_reference
from mlx_qwen35.kernels.attention_inputs import attention_inputs
from mlx_qwen35.kernels.attention_inputs.reference import attention_inputs as attention_inputs_reference
from mlx_qwen35.kernels.backend import FOLDER
from mlx_qwen35.kernels.delta_decode import delta_decode
from mlx_qwen35.kernels.delta_decode.reference import delta_decode as delta_decode_reference
from mlx_qwen35.kernels.ragged_attention import Piece, of_spans, planned
from mlx_qwen35.kernels.ragged_attention.reference import ragged_attention as ragged_attention_reference
from mlx_qwen35.kernels.weights import Weights
from tests.metal_emulator.sparse import Sparse, last_groups

F16, F32 = mx.float16, mx.float32


def filled(shape, dtype, last, seed):
    """Zeros but for the last elements along the first axes; -> it and what is there, as float32 [1, ..]."""
    made = Sparse(shape, dtype)
    rng = np.random.RandomState(seed)
    made.values[last] = rng.standard_normal(made.values[last].shape)
    return made, mx.array(made.values[last].astype(np.float32))[None]


def close(found, expected):
    np.testing.assert_allclose(np.array(found, np.float32), np.array(expected), atol=1e-2 * np.abs(expected).max())
    assert np.abs(np.array(expected)).max() > 0.1


def test_add_norm():
    width = 4096
    rows = 2**31 // width + 2
    (x, one), (added, other) = (filled((rows, width), F16, -1, seed) for seed in (0, 1))
    weight = mx.ones((width,))
    found = last_groups(lambda *a: add_norm(*a, eps=1e-6), [x, added, weight], 1)
    for ours, theirs in zip(found, add_norm_reference(one, other, weight, eps=1e-6), strict=True):
        close(ours[-1], theirs[0])


@pytest.mark.parametrize("batch, tokens, heads", [(1, 150_000, 26), (2, 70_000, 64)])
def test_attention_inputs(batch, tokens, heads):
    """150,000 tokens of a product of 26 heads; and results that alone are so many."""
    kv_heads, dim, half = 2, 256, 32
    width = (2 * heads + 2 * kv_heads) * dim
    assert batch * tokens * width > 2**31
    product, last = filled((batch, tokens, width), F16, (-1, -1), 0)
    norms = [mx.ones((dim,), F16), mx.ones((dim,), F16)]
    angles = [filled((1, 1, tokens, half), F32, (-1, -1, -1), seed) for seed in (1, 2)]
    how = {"heads": heads, "kv_heads": kv_heads, "eps": 1e-6}
    keys_at = 2 * heads * dim
    q, k, gates = last_groups(
        lambda j, *a: attention_inputs(j, j, *a, **how, keys_at=keys_at), [product, *norms, *(a for a, _ in angles)],
        -(-(heads + kv_heads) // 4),
    )  # fmt: skip
    joined = last[None]
    wanted = attention_inputs_reference(
        joined[..., :keys_at], joined[..., keys_at : keys_at + kv_heads * dim], *norms,
        *(a[:, None, None] for _, a in angles), **how,
    )  # fmt: skip
    close(q[-1, :, -1], wanted[0][0, :, 0])
    close(k[-1, :, -1], wanted[1][0, :, 0])
    close(gates[-1, -1], wanted[2][0, 0])


def test_delta_decode():
    """Sequences with drafted tokens, whose states are many."""
    batch, tokens, heads, dim, taps = 300, 8, 64, 128, 2
    channels = 3 * heads * dim
    assert batch * tokens * heads * dim * dim > 2**31
    mixed, last = filled((batch, tokens, channels + heads * dim), F16, -1, 0)
    gates, last_gates = filled((batch, tokens, 2 * heads), F16, -1, 1)
    window, last_window = filled((batch, taps - 1, channels), F16, -1, 2)
    state, last_state = filled((batch, heads, dim, dim), F32, -1, 3)
    weights = [mx.ones((channels, taps), F16), mx.zeros((heads,)), mx.zeros((heads,)), mx.ones((dim,))]
    how = {"key_heads": heads, "eps": 1e-6}
    y, windows, states = last_groups(
        lambda *a: delta_decode(*a, **how, each=True), [mixed, gates, window, *weights, state], 1
    )
    wanted = delta_decode_reference(last, last_gates, last_window, *weights, last_state, **how)
    close(y[-1, :, -dim:], wanted[0][0, :, -dim:])
    close(states[-1, :, -1], wanted[2][0, :, -1])
    values = slice(channels - dim, channels)  # those that the last head writes
    close(windows[-1, :, :, values], wanted[1][0, :, :, values])


def test_ragged_attention():
    """A past of which one row alone has so many values; the newest lie at the end of it."""
    heads, kv_heads, dim, held = 4, 2, 256, 7
    capacity = 2**31 // (kv_heads * dim) + held
    keys, values = (filled((1, kv_heads, capacity, dim), F16, (0, -1, slice(-held, None)), seed) for seed in (0, 1))
    rows = ((Piece(0, 0, capacity - held, held),),)
    queries = mx.random.normal((1, heads, dim), key=mx.random.key(3)).astype(F16)
    plan = planned(rows, (capacity,), kv_heads)
    made, _ = last_groups(
        lambda q, k, v: of_spans(q, [(k, v)], plan), [queries, keys[0], values[0]], 1
    )
    short = (keys[1][None], values[1][None])
    wanted = ragged_attention_reference(queries[:, -2:], [short], ((Piece(0, 0, 0, held),),))
    close(made[0, -2:], wanted[0])


def test_experts():
    hidden, size, shared, k = 64, 2048, 64, 8
    rows = 2**32 // (size * k) + 2
    mx.random.seed(1)
    gate, up, shared_gate, shared_up, down, shared_down = (
        Weights.of(mx.random.normal(shape).astype(F16))
        for shape in (*[(3, size, hidden)] * 2, *[(shared, hidden)] * 2, (3, 8, size), (8, shared))
    )
    x, last_x = filled((rows, hidden), F16, -1, 0)
    ids = Sparse((rows, k), mx.uint32)
    ids.values[-1] = [2, 1, 0, 2, 1, 0, 1, 2]
    last_ids = mx.array(ids.values[-1:])
    found = last_groups(
        lambda x, ids: expert_gate_up.gate_up(x, ids, gate, up, shared_gate, shared_up), [x, ids], (k + 1) * (size // 8)
    )
    wanted = expert_gate_up.reference.gate_up(last_x, last_ids, gate, up, shared_gate, shared_up)
    close(found[0][-1], wanted[0][0])
    close(found[1][-1], wanted[1][0])
    held, last_held = filled((rows, k, size), F16, -1, 1)
    beside, last_beside = filled((rows, shared), F16, -1, 2)
    weights, last_weights = filled((rows, k + 1), F32, -1, 3)
    (out,) = last_groups(
        lambda *a: expert_down.down(*a, down, shared_down), [held, beside, ids, weights], 1
    )
    close(out[-1], expert_down.reference.down(last_held, last_beside, last_ids, last_weights, down, shared_down)[0])


def test_router():
    experts, k, width = 1024, 2, 64
    rows = 2**32 // experts + 2
    gate = Weights.of(mx.random.normal((1, width)))
    logits, last = filled((rows, experts), F16, -1, 0)
    x, last_x = filled((rows, width), F32, -1, 1)
    ids, weights = last_groups(lambda *a: router.route(a[0], k, a[1], gate), [logits, x], 1)
    wanted_ids, wanted = router.reference.route_with_shared(last, k, last_x, gate.values())
    assert sorted(ids[-1].tolist()) == sorted(wanted_ids[0].tolist())
    close(np.sort(weights[-1, :k]), np.sort(np.array(wanted[0, :k])))
    close(weights[-1, k:], wanted[0, k:])


@pytest.mark.parametrize("body", sorted(FOLDER.glob("*/body.metal")), ids=lambda path: path.parent.name)
def test_what_counts_rows_has_64_bits(body):
    """Rows, tokens and sequences of a call are any number: what is multiplied with them has to be wide enough."""
    text = re.sub(r"//.*", "", body.read_text())
    for name in ("batch", "token", "start", "from", "turn"):
        for declared in re.findall(rf"\b(\w+) {name}\b\s*=", text):
            assert declared == "size_t", f"{declared} {name}"
    for declared in re.findall(r"(\w+) row = (?=[^;]*(?:number|threadgroup_position_in_grid))", text):
        assert declared == "size_t", f"{declared} row"
