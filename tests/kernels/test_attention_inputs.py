"""Norms, rotary positions and gates in one: against the reference, on three axes, out of a joined product."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.config import Rope
from mlx_qwen35.kernels.attention_inputs import attention_inputs
from mlx_qwen35.kernels.attention_inputs.reference import attention_inputs as reference
from mlx_qwen35.layers.rope import RotaryEmbedding
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs

# batch, tokens, heads, key heads, D, rotary values of a head
SIZES = [(1, 1, 6, 3, 16, 8), (2, 2, 5, 1, 40, 40), (1, 63, 3, 2, 24, 6), (1, 257, 3, 2, 24, 6), (1, 1, 16, 2, 256, 64)]


def inputs(size, dtype=mx.float32, *, axes=False, seed=0):
    batch, tokens, heads, kv_heads, dim, rotary = size
    rng = np.random.RandomState(seed)
    x = rng.standard_normal((batch, tokens, (2 * heads + kv_heads) * dim)).astype(np.float32)
    q, k = mx.split(mx.array(x).astype(dtype), [2 * heads * dim], axis=-1)
    norms = [mx.array(rng.uniform(0.3, 2, dim).astype(np.float32)).astype(dtype) for _ in range(2)]
    rope = RotaryEmbedding(Rope(theta=1e4, rotary_dim=rotary, mrope_section=(rotary // 2, 0, 0), yarn=None))
    if axes:  # of each sequence others
        rope = RotaryEmbedding(
            Rope(theta=1e4, rotary_dim=rotary, mrope_section=(rotary // 2 - 2, 1, 1), yarn=None)
        )
        positions = mx.array(rng.randint(0, 40, (3, batch, tokens)))
    else:
        positions = mx.arange(7, 7 + tokens)[None]
    return [q, k, *norms, *rope(positions)]


def how(size):
    return {"heads": size[2], "kv_heads": size[3], "eps": 1e-5}


F32, BF16 = mx.float32, mx.bfloat16


@pytest.mark.parametrize(
    "number, dtype, axes",
    [(0, F32, False), (1, F32, True), (2, F32, True), (2, BF16, False), (3, F32, False), (4, BF16, True)],
)
def test_equals_the_reference(number, dtype, axes):
    size = SIZES[number]
    check(
        lambda *a: attention_inputs(*a, **how(size)),
        lambda *a: reference(*a, **how(size)),
        inputs(size, dtype, axes=axes),
        sanitize=number == 1,
    )


@pytest.mark.parametrize("on_gpu", [False, True])
def test_columns_of_a_joined_product(on_gpu):
    size = SIZES[1]
    q, k, *rest = inputs(size, axes=True)
    joined = mx.concatenate([q, mx.ones((*q.shape[:2], 3)), k, mx.ones((*q.shape[:2], 5))], axis=-1)
    expected = reference(q, k, *rest, **how(size))

    def of_joined(j, *a):
        return attention_inputs(j, j, *a, **how(size), keys_at=q.shape[-1] + 3)

    if on_gpu:
        check(of_joined, lambda j, *a: expected, [joined, *rest])
    else:
        for ours, theirs in zip(of_joined(joined, *rest), expected, strict=True):
            assert mx.array_equal(ours, theirs)


def test_a_token_has_the_same_bits_alone():
    size = SIZES[2]
    q, k, q_norm, k_norm, cos, sin = inputs(size, BF16)
    with poisoned_outputs():
        queries, keys, gates = attention_inputs(q, k, q_norm, k_norm, cos, sin, **how(size))
        for t in (0, 31, 62):
            token = slice(t, t + 1)
            alone = attention_inputs(
                q[:, token], k[:, token], q_norm, k_norm, cos[:, :, token], sin[:, :, token], **how(size)
            )
            assert mx.array_equal(alone[0], queries[:, :, token]) and mx.array_equal(alone[1], keys[:, :, token])
            assert mx.array_equal(alone[2], gates[:, token])


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_compiles_for_cuda(dtype):
    made = compile_for_cuda(lambda *a: attention_inputs(*a, **how(SIZES[2])), inputs(SIZES[2], dtype))
    assert made == {"attention_inputs"}
