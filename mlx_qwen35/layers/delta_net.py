"""The gated delta net: linear attention whose memory is one matrix per head.

Knows projections, the short convolution and the gates; the recurrence itself is kernels/gated_delta.
Knows neither positions nor other layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from mlx_qwen35.cache.ragged import RaggedDelta

from ..cache import DeltaState, State
from ..config import TextConfig
from ..kernels.activation import fused, silu
from ..kernels.backend import on_gpu
from ..kernels.delta_decode import MOST_TOKENS, SIMDS, delta_decode
from ..kernels.gated_delta import gated_delta, gated_delta_in_turn, gated_delta_states
from ..kernels.lanes import LEAST_SHARED, in_lanes, together
from ..kernels.once import cut, once
from ..kernels.rms_norm import rms_norm
from .joined import JoinedInputs, columns, neighbours
from .linear import Linear, rows_in_lanes, worth_lanes
from .norm import GatedRMSNorm
from .summed import Summed, array_of


class ShortConv(nn.Module):
    """Causal convolution of each channel by itself, without bias; tap K-1 is the present token."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = mx.zeros((channels, kernel, 1))

    def __call__(self, x: mx.array, window: mx.array | None, ends: mx.array | None = None) -> tuple[mx.array, mx.array]:
        """x [B, T, C], window [B, K-1, C] (the inputs before x; None: zeros) -> y [B, T, C], the next window.

        ends [B]: how many of the T go before it, where rows end in padding; None: all.
        """
        before = self.weight.shape[1] - 1
        with_window = self._with_window(x, window)
        y = _convolution(with_window, self.weight)
        if ends is not None:
            return y, mx.take_along_axis(with_window, (ends[:, None] + mx.arange(before))[..., None], axis=1)
        return y, self._last(with_window)

    def of(self, channels: Sequence[slice], x: mx.array, window: mx.array | None) -> mx.array:
        """y [B, T, C'] of these channels alone, which x [B, T, C'] and window hold side by side."""
        key = tuple((part.start, part.stop) for part in channels)
        weight = once(self.weight, key, lambda all_: mx.concatenate([all_[part] for part in channels]))
        return _convolution(self._with_window(x, window), weight)

    def over(self, windowed: mx.array) -> mx.array:
        """[B, K-1+T, C], x behind its window -> y [B, T, C]."""
        return _convolution(windowed, self.weight)

    def next_window(self, x: mx.array, window: mx.array | None) -> mx.array:
        """The window after x [B, T, C] and `window`."""
        length, before = x.shape[1], self.weight.shape[1] - 1
        if window is None or length >= before:
            return self._last(self._with_window(x, window))
        return mx.concatenate([window[:, length:], x], axis=1)

    def _last(self, with_window: mx.array) -> mx.array:
        # Contiguous: a plain slice would keep the whole chunk alive.
        return mx.contiguous(with_window[:, with_window.shape[1] - self.weight.shape[1] + 1 :])

    def windows(self, x: mx.array, window: mx.array | None, ends: Sequence[int]) -> list[mx.array]:
        """The next window after so many of the T tokens, of x and window as above."""
        before, x = self.weight.shape[1] - 1, self._with_window(x, window)
        return [mx.contiguous(x[:, end : end + before]) for end in ends]

    def _with_window(self, x: mx.array, window: mx.array | None) -> mx.array:
        """[B, K-1+T, C]."""
        batch, _, channels = x.shape
        if window is None:
            window = mx.zeros((batch, self.weight.shape[1] - 1, channels), x.dtype)
        return mx.concatenate([window, x], axis=1)


def _convolution(x: mx.array, weight: mx.array) -> mx.array:
    """x [B, K-1+T, C], weight [C, K, 1] -> [B, T, C]. On the CPU tap by tap: the sums of mx.conv1d, which is scalar
    there, in a third of the time for 512 tokens and a tenth for one."""
    taps = weight.shape[1]
    if mx.default_device().type != mx.cpu:
        return mx.conv1d(x, weight, groups=x.shape[-1])
    length, by_tap = x.shape[1] - taps + 1, once(weight, "taps", lambda w: mx.contiguous(w.squeeze(-1).T))  # [K, C]
    if length == 1 and x.dtype == mx.float32:
        return (x * by_tap).sum(axis=1, keepdims=True)  # one tap after the other, too
    y = x[:, :length] * by_tap[0]
    for tap in range(1, taps):
        y = y + x[:, tap : tap + length] * by_tap[tap]
    return y


class GatedDeltaNet(JoinedInputs, nn.Module):
    """in_proj -> short convolution -> delta rule with decay and write strength -> gated norm -> out_proj."""

    unfused = False  # MLX's operations take the kernel's place: it was found wrong here, or is not wanted
    most_simds = SIMDS[0]
    _most_in_one: float = MOST_TOKENS  # tokens of a call that a GPU takes in one launch
    _plain = False  # the rule not in MLX's own form on a GPU

    def be_exact(self) -> None:
        """From now on a GPU takes one token after the other in the kernel that decodes, and never MLX's own form."""
        self._most_in_one, self._plain = math.inf, True

    def __init__(self, config: TextConfig):
        super().__init__()
        self.key_heads, self.value_heads = config.linear_num_key_heads, config.linear_num_value_heads
        self.key_dim, self.value_dim = config.linear_key_head_dim, config.linear_value_head_dim
        hidden, keys, values = (
            config.hidden_size,
            self.key_heads * self.key_dim,
            self.value_heads * self.value_dim,
        )
        self.in_proj_qkv = Linear(hidden, 2 * keys + values, bias=False)
        self.in_proj_z = Linear(hidden, values, bias=False)
        self.in_proj_b = Linear(hidden, self.value_heads, bias=False)
        self.in_proj_a = Linear(hidden, self.value_heads, bias=False)
        self.conv1d = ShortConv(2 * keys + values, config.linear_conv_kernel_dim)
        self.A_log = mx.zeros((self.value_heads,))
        self.dt_bias = mx.zeros((self.value_heads,))
        self.norm = GatedRMSNorm(self.value_dim, config.rms_norm_eps)
        self.out_proj = Linear(values, hidden, bias=False)
        self._widths = [2 * keys + values, values, self.value_heads, self.value_heads]
        self.eval()  # train() chooses another form of the recurrence

    def __call__(
        self,
        x: mx.array | Summed,
        cache: DeltaState | RaggedDelta | None = None,
        present: mx.array | None = None,
    ) -> mx.array:
        """x [B, T, H], or what is to be its norm -> [B, T, H]. cache: of this layer, or None.

        present [B, T]: which of these positions are tokens and not padding; None where all are. Padding on the left
        leaves window and state at zero, because nothing here has a bias; padding on the right (mlx-lm's batches have
        it) leaves them as they were.
        """
        if isinstance(cache, RaggedDelta):
            return self._ragged(x, cache)
        batch, length, _ = x.shape
        in_one = on_gpu() and present is None and length <= self._most_in_one and not (self.training or self.unfused)
        if in_one and self.conv1d.weight.shape[1] > 1:
            return self._decode(x, cache)
        x = array_of(x)
        if present is None and not self.training and worth_lanes(x, *self.joinable(), self.out_proj):
            return self._by_heads(x, cache)
        ends = None
        if present is not None:
            x = mx.where(present[..., None], x, 0)
            ends = _ends(present)
        raw, z, b, a = columns(self._joined(x, self.joinable()), self._widths)
        u, window = self.conv1d(raw, cache.conv if cache is not None else None, ends)
        out, made = self._ruled(u, z, b, a, slice(0, self.value_heads), cache, present)
        self._keep(cache, raw, window, made)
        return self.out_proj(out)

    def _ragged(self, x: mx.array | Summed, cache: RaggedDelta) -> mx.array:
        """The same for pieces of several sequences, one behind the other in x [1, N, H]."""
        raw, *given = columns(self._joined(x, self.joinable()), self._widths)
        before, made = self.conv1d.weight.shape[1] - 1, []
        for block in cache.blocks:
            states = cache.of(block)
            ends = [block.length] if states.steps is None else states.ends(block.length)
            windowed = block.windowed(raw, cache.windows(block), before)
            z, b, a = (each[0][block.tokens] for each in given)
            u = self.conv1d.over(windowed)
            out, (matrix,) = self._ruled(u, z, b, a, slice(0, self.value_heads), states, block.present)
            cache.take(block, windowed, matrix, ends)
            made.append(out)
        return self.out_proj(cache.in_order(made))

    def _ruled(
        self,
        u: mx.array,
        z: mx.array,
        b: mx.array,
        a: mx.array,
        heads: slice,
        cache: DeltaState | None,
        present: mx.array | None = None,
    ) -> tuple[mx.array, list[mx.array]]:
        """What lies between convolution and out_proj, for these value heads: u, z, b, a of theirs alone.

        Returns (out [B, T, heads * Dv], [matrices after the last token or, where the cache keeps steps, at its `ends`];
        where it is late, after the last and what the rule read: k, v, gamma, beta).
        """
        batch, length, _ = u.shape
        count = heads.stop - heads.start
        key_heads = count * self.key_heads // self.value_heads
        keys = key_heads * self.key_dim
        u = silu(u).astype(mx.float32)
        qk, v = mx.split(u, [2 * keys], axis=-1)
        q, k = _unit(qk.reshape(batch, length, 2 * key_heads, self.key_dim))
        v = v.reshape(batch, length, count, self.value_dim)
        A_log, dt_bias = (cut(each, heads) for each in (self.A_log, self.dt_bias))
        gamma, beta = decay(a, A_log, dt_bias), write_strength(b)
        if present is not None:
            gamma, beta = mx.where(present[..., None], gamma, 1), mx.where(present[..., None], beta, 0)
        before = None if cache is None or cache.matrix is None else cache.matrix[:, heads]
        read = []
        if cache is not None and cache.late:
            out, matrix = gated_delta_in_turn(q, k, v, gamma, beta, before, plain=self._plain)
            read = [k, v, gamma, beta]
        elif cache is not None and cache.steps is not None:
            ends = cache.ends(length)
            out, matrix = gated_delta_states(q, k, v, gamma, beta, before, ends=ends, plain=self._plain)
        else:
            how = {"differentiable": self.training, "plain": self._plain}
            out, matrix = gated_delta(q, k, v, gamma, beta, before, **how)
        z = z.reshape(batch, length, count, self.value_dim)
        return self.norm(out.astype(z.dtype), z).reshape(batch, length, -1), [matrix, *read]

    def _keep(self, cache: DeltaState | None, raw: mx.array, window: mx.array, made: list[mx.array]) -> None:
        """raw [B, T, C]: what went into the convolution; window: after that; made: as `_ruled` returns it."""
        matrix, *read = made
        if read:
            cache.again = self._again(cache, raw, (window, matrix), read)
            cache.update(window, matrix)
        elif cache is not None and cache.steps is not None:
            matrices, length = [matrix[:, n] for n in range(matrix.shape[1])], raw.shape[1]
            cache.update_each(self.conv1d.windows(raw, cache.conv, cache.ends(length)), matrices, length)
        elif cache is not None:
            cache.update(window, matrix)

    def _again(
        self, cache: DeltaState, raw: mx.array, last: State, read: Sequence[mx.array]
    ) -> Callable[[int], State]:
        """-> window and matrix after the first so many of a call's tokens. last: after all of them."""
        conv, before, length = cache.conv, cache.matrix, raw.shape[1]

        def after(count: int) -> State:
            if count == length:
                return last
            k, v, gamma, beta = (each[:, :count] for each in read)
            _, matrix = gated_delta_in_turn(k, k, v, gamma, beta, before, plain=self._plain)
            return self.conv1d.windows(raw, conv, [count])[0], matrix

        return after

    def _by_heads(self, x: mx.array, cache: DeltaState | None) -> mx.array:
        """The same for a few tokens on a CPU: each lane takes some heads from x to out_proj, and waits for nobody, then
        some outputs of that."""
        each = self.value_heads // self.key_heads
        keys = self.key_heads * self.key_dim
        window, matrix = (None, None) if cache is None else (cache.conv, cache.matrix)

        def some(heads: slice) -> tuple[list[mx.array], mx.array, list[mx.array]]:
            values = slice(heads.start * each, heads.stop * each)
            q = slice(heads.start * self.key_dim, heads.stop * self.key_dim)
            k = slice(keys + q.start, keys + q.stop)
            v = slice(values.start * self.value_dim, values.stop * self.value_dim)
            channels = [q, k, slice(2 * keys + v.start, 2 * keys + v.stop)]
            raws = [self.in_proj_qkv.rows(x, part) for part in channels]
            z, b, a = self.in_proj_z.rows(x, v), self.in_proj_b.rows(x, values), self.in_proj_a.rows(x, values)
            own = None if window is None else mx.concatenate([window[..., part] for part in channels], axis=-1)
            u = self.conv1d.of(channels, mx.concatenate(raws, axis=-1), own)
            return raws, *self._ruled(u, z, b, a, values, cache)

        work = x.shape[-1] * (2 * self.key_dim + 2 * each * self.value_dim)  # of a key head and a row
        parts = in_lanes(some, self.key_heads, least=-(-LEAST_SHARED // work))
        raw = mx.concatenate([raws[n] for n in range(3) for raws, _, _ in parts], axis=-1)
        heads_at = 2 if cache is not None and cache.steps is not None and not cache.late else 1
        matrix, *read = zip(*(made for _, _, made in parts), strict=True)
        made = [mx.concatenate(matrix, axis=heads_at), *(mx.concatenate(each, axis=2) for each in read)]
        self._keep(cache, raw, self.conv1d.next_window(raw, window), made)
        outs = [out for _, out, _ in parts]
        width = self.value_heads * self.value_dim
        return together(rows_in_lanes(lambda taken: self.out_proj.rows(together(outs), taken), x.shape[-1], width))

    def joinable(self) -> list[nn.Module]:
        return [self.in_proj_qkv, self.in_proj_z, self.in_proj_b, self.in_proj_a]

    def _decode(self, x: mx.array | Summed, cache: DeltaState | None) -> mx.array:
        """The same for a few tokens on a GPU, what is between the projections in one launch."""
        made = self._joined(x, self.joinable())
        mixed, _ = neighbours(made[:2])  # begins at column 0, as the first projection does
        gates, gates_at = neighbours(made[2:])
        window, matrix = (None, None) if cache is None else (cache.conv, cache.matrix)
        channels, taps, _ = self.conv1d.weight.shape
        if window is None:
            window = mx.zeros((x.shape[0], taps - 1, channels), mixed.dtype)
        if matrix is None:
            matrix = mx.zeros((x.shape[0], self.value_heads, self.value_dim, self.key_dim), mx.float32)
        each = cache is not None and cache.steps is not None and cache.places is None
        length = x.shape[1]
        ends = cache.ends(length) if cache is not None and cache.places is not None else [length]
        outs, windows, matrices = [], [], []
        for start, end in pairwise([0, *ends]):
            part = (mixed, gates) if len(ends) == 1 else (mixed[:, start:end], gates[:, start:end])
            y, window, matrix = delta_decode(
                *part,
                window,
                self.conv1d.weight.squeeze(-1),
                self.A_log,
                self.dt_bias,
                self.norm.weight,
                matrix,
                key_heads=self.key_heads,
                eps=self.norm.eps,
                gates_at=gates_at,
                each=each,
                most_simds=self.most_simds,
            )
            outs.append(y)
            windows.append(window)
            matrices.append(matrix)
        if each:
            cache.update_each(*([a[:, t] for t in range(length)] for a in (window, matrix)), length)
        elif cache is not None and cache.steps is not None:
            cache.update_each(windows, matrices, length)
        elif cache is not None:
            cache.update(window, matrix)
        return self.out_proj(outs[0] if len(outs) == 1 else mx.concatenate(outs, axis=1))


def _ends(present: mx.array) -> mx.array:
    """How many of T positions go before the padding at the end of each row, [B]; 0 where all is padding.

    present  . . 1 1 -> 4     1 1 . . -> 2     . . . . -> 0
    """
    behind = mx.argmax(present[:, ::-1].astype(mx.int32), axis=1)  # the padding at the end; 0 where all is
    return mx.where(mx.any(present, axis=1), present.shape[1] - behind, 0)


@fused
def write_strength(b: mx.array) -> mx.array:
    """sigmoid(b) in float32."""
    return mx.sigmoid(b.astype(mx.float32))


@fused
def decay(a: mx.array, A_log: mx.array, dt_bias: mx.array) -> mx.array:
    """exp(-exp(A_log) * softplus(a + dt_bias)), all in float32: in bfloat16 a decay near 1 would round to 1."""
    a, A_log, dt_bias = (p.astype(mx.float32) for p in (a, A_log, dt_bias))
    return mx.exp(-mx.exp(A_log) * mx.logaddexp(a + dt_bias, 0))


def _unit(heads: mx.array) -> tuple[mx.array, mx.array]:
    """Queries and behind them as many keys, [B, T, 2 Hk, Dk], each as x / sqrt(sum(x^2) + 1e-6), and queries divided
    by sqrt(Dk) once more. By way of the fused norm: sum = size * mean."""
    size, count = heads.shape[-1], heads.shape[-2] // 2
    normed = rms_norm(heads, None, 1e-6 / size)
    return normed[..., :count, :] * (size**-0.5 * size**-0.5), normed[..., count:, :] * size**-0.5
