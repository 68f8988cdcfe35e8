"""A delta net between its projections, for a few tokens: one launch on a GPU, with the state after each token if asked.

Knows how the work is laid out. What is computed: reference.py, the order of sums: body.metal. Elsewhere than on a GPU
the layer takes its own steps, which suit prompts too.
"""

from __future__ import annotations

import mlx.core as mx

from ..backend import Kernel

MOST_TOKENS = 8  # of a sequence in one launch; a prompt goes through the chunked rule, unless it is to be exact
# SIMD groups a head: with 128 x 128 states, 32 values a thread; and fewer, for a GPU that does not give so many threads
# so many registers. The bits are the same.
SIMDS = (16, 8, 4)

_KERNEL = Kernel(
    "delta_decode",
    ["mixed", "gates", "window", "taps", "A_log", "dt_bias", "norm", "state", "settings"],
    ["y", "windows", "states"],
    "delta_decode/body.metal",
)


def delta_decode(
    mixed: mx.array,
    gates: mx.array,
    window: mx.array,
    taps: mx.array,
    A_log: mx.array,
    dt_bias: mx.array,
    norm: mx.array,
    state: mx.array,
    *,
    key_heads: int,
    eps: float,
    gates_at: int = 0,
    each: bool = False,
    most_simds: int = SIMDS[0],
) -> tuple[mx.array, mx.array, mx.array]:
    """Arguments as in reference.py, where `backend.on_gpu()`; made for MOST_TOKENS tokens, right for any number.

    mixed may have more columns than it needs, gates more before and behind: b begins at column `gates_at`. So both may
    be one array, the product of projections that were joined.
    each: windows and states after each token, as in the reference; else those after the last, [B, K-1, C] and
    [B, Hv, Dv, Dk]. most_simds: one of SIMDS.
    """
    batch, length, width = mixed.shape
    heads, value_dim, key_dim = state.shape[1:]
    channels, count = taps.shape[:2]
    simds = max(1, min(most_simds, value_dim // 4))
    tokens = (batch, length) if each else (batch,)
    constants = {
        "T": mixed.dtype, "TAP": taps.dtype, "RATE": A_log.dtype, "BIAS": dt_bias.dtype, "NORM": norm.dtype,
        "MIXED": width, "GATES": gates.shape[-1], "FIRST": gates_at,
        "HK": key_heads, "HV": heads, "DK": key_dim, "DV": value_dim, "TAPS": count,
        "SIMDS": simds, "ROWS": -(-value_dim // simds), "COLUMNS": -(-key_dim // 32),
    }  # fmt: skip
    y, windows, states = _KERNEL(
        [mixed, gates, window, taps, A_log, dt_bias, norm, state, mx.array([eps, each], mx.float32)],
        [
            ((batch, length, heads * value_dim), mixed.dtype),
            ((*tokens, count - 1, channels), window.dtype),
            ((*tokens, heads, value_dim, key_dim), mx.float32),
        ],
        constants,
        groups=(heads, batch, 1),
        threads=(32 * simds, 1, 1),
    )
    return y, windows, states
