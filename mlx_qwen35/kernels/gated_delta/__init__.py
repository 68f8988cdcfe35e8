"""The gated delta rule: MLX's own kernel where it has one for these sizes, the plain form where not.

Knows which form to run. Knows neither layers nor caches.
On a CPU, MLX's own form goes token by token: 512 tokens of 16 heads take the chunked twin a fifth of its time and, with
no state per token to keep, a fraction of its memory. Fewer than 16 tokens go token by token there too, by products that
take a third of its time (products.py), and have the same bits however they are cut; the chunked form gives other bits
wherever a chunk begins, within float32's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import mlx.core as mx

from ..lanes import in_lanes
from .products import gated_delta_products
from .reference import gated_delta_chunks, gated_delta_steps

_LEAST_SHARED = 2**22  # tokens times values of a state that are worth a lane of their own: some milliseconds
_CHUNKS_FROM = 16  # tokens; the plain forms break even about there for small heads

_OWN = getattr(mx.fast, "gated_delta_update", None)
_ON_GPU = mx.default_device().type == mx.gpu
# The float32 kernels in MLX 0.32.4's Metal library: both head sizes 128, and these (Hk, Hv). For other sizes, and on
# CUDA, mx.fast would unroll the recurrence into some thirty operations a token.
_METAL_HEADS = {(16, 16), (16, 32), (16, 48), (16, 64), (24, 24), (32, 32)}


def gated_delta(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    *,
    differentiable: bool = False,
    plain: bool = False,
) -> tuple[mx.array, mx.array]:
    """Run the recurrence over T tokens from `state` (None: zeros); reference.py defines it and is its twin.

    q, k: [B, T, Hk, Dk]; v: [B, T, Hv, Dv]; decay in (0, 1], beta: [B, T, Hv]; state: [B, Hv, Dv, Dk]. All float32, and
    that matters: MLX's kernel takes the decay in the dtype of q, and in bfloat16 a decay of 0.999 is 1.
    differentiable: gradients will be asked for. MLX finds those of its own form token by token: at 512 tokens the plain
    form's come in a sixth of the time (on the CPU).
    plain: on a GPU not by MLX's own form, whose arithmetic is relaxed on M5 (docs/EXACTNESS.md).
    Returns (o [B, T, Hv, Dv], state after the last token), float32.
    """
    if state is None:
        state = mx.zeros((q.shape[0], v.shape[2], v.shape[3], k.shape[3]), mx.float32)
    if not differentiable and not (plain and _ON_GPU) and has_own_form(q.shape[2:], v.shape[2:], q.shape[1]):
        output, state = _OWN(q, k, v, decay, beta, state)
        return output, state
    if differentiable or _ON_GPU:
        return plain_gated_delta(q, k, v, decay, beta, state)
    return _by_heads(q, k, v, decay, beta, state)


def gated_delta_states(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    *,
    ends: Sequence[int] | None = None,
    plain: bool = False,
) -> tuple[mx.array, mx.array]:
    """gated_delta with the state after so many tokens, of which the last are all T; None: after each of them.

    Arguments as above. Returns (o [B, T, Hv, Dv], states [B, len(ends), Hv, Dv, Dk]), float32. What lies between two
    ends goes alone: outputs and states are bit for bit those of calls that end there, of decoding where there is each.
    All states exist together: 2 MiB each for 32 heads of 128 x 128.
    """
    outputs, states = [], []
    ends = range(1, q.shape[1] + 1) if ends is None else ends
    for start, end in pairwise([0, *ends]):
        output, state = gated_delta(*(a[:, start:end] for a in (q, k, v, decay, beta)), state, plain=plain)
        outputs.append(output)
        states.append(state)
    return mx.concatenate(outputs, axis=1), mx.stack(states, axis=1)


def gated_delta_in_turn(
    q: mx.array,
    k: mx.array,
    v: mx.array,
    decay: mx.array,
    beta: mx.array,
    state: mx.array | None = None,
    *,
    plain: bool = False,
) -> tuple[mx.array, mx.array]:
    """gated_delta, one token after the other however many they are: with the bits of `gated_delta_states`, but without
    its states. So the first so many of the tokens give the state that was there after them."""
    length = q.shape[1]
    own = not (plain and _ON_GPU) and has_own_form(q.shape[2:], v.shape[2:], length)
    outputs = []
    for start in range(0, length, length if own else _CHUNKS_FROM - 1):
        part = slice(start, start + (length if own else _CHUNKS_FROM - 1))
        output, state = gated_delta(*(a[:, part] for a in (q, k, v, decay, beta)), state, plain=plain)
        outputs.append(output)
    return outputs[0] if len(outputs) == 1 else mx.concatenate(outputs, axis=1), state


def has_own_form(
    key_heads: tuple[int, int],
    value_heads: tuple[int, int],
    tokens: int,
    *,
    gpu: bool = _ON_GPU,
    metal: bool | None = None,
) -> bool:
    """Whether MLX's own form is taken for so many tokens of heads of these (count, size).

    gpu, metal: the default device, as found at import.
    """
    if _OWN is None or not gpu:
        return False
    metal = mx.metal.is_available() if metal is None else metal
    return metal and key_heads[1] == value_heads[1] == 128 and (key_heads[0], value_heads[0]) in _METAL_HEADS


def _by_heads(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """gated_delta on a CPU, its heads shared out among the cores."""
    each = v.shape[2] // q.shape[2]  # value heads of a key head

    def some(heads: slice) -> tuple[mx.array, mx.array]:
        values = slice(heads.start * each, heads.stop * each)
        own = v[:, :, values], decay[:, :, values], beta[:, :, values], state[:, values]
        return _on_cpu(q[:, :, heads], k[:, :, heads], *own)

    work = each * v.shape[1] * v.shape[0] * k.shape[3] * v.shape[3]  # of a key head
    if q.shape[2] * work < 2 * _LEAST_SHARED:
        return _on_cpu(q, k, v, decay, beta, state)
    outputs, states = zip(*in_lanes(some, q.shape[2], least=-(-_LEAST_SHARED // work)), strict=True)
    return mx.concatenate(outputs, axis=2), mx.concatenate(states, axis=1)


def plain_gated_delta(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """gated_delta without MLX's own kernel."""
    form = gated_delta_steps if q.shape[1] < _CHUNKS_FROM else gated_delta_chunks
    return form(q, k, v, decay, beta, state)


def _on_cpu(
    q: mx.array, k: mx.array, v: mx.array, decay: mx.array, beta: mx.array, state: mx.array
) -> tuple[mx.array, mx.array]:
    """gated_delta for some heads on a CPU."""
    form = gated_delta_products if q.shape[1] < _CHUNKS_FROM else gated_delta_chunks
    return form(q, k, v, decay, beta, state)
