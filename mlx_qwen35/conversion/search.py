"""The scale and bias of each group of weights that lose least, in MLX's affine format: found by closed forms.

Knows a group by a few sums over its values (passes.py). Knows nothing of modules, of files or of how codes are packed.

A weight x is t = (x - bias) / scale in codes, and rounding loses scale^2 r^2 of it, where r = t - round(t). That
repeats when t grows by 1; as a Fourier series r^2 is 1 / 12 - cos(2 pi t) / pi^2 + ... With another bias all t of a
group of G weights shift alike, so that the group loses about

    scale^2 (G / 12 - F cos(2 pi (shift - best)) / pi^2),    F and best from the sums of cos(2 pi t) and sin(2 pi t):

one pass tells the best of all biases that a scale may have, and about what it loses. Another one rounds.

MLX's own line is measured beside it. With 2 bits, and from 6 on, that is done always, so that no group gets worse than
by mx.quantize. Between them it brings nothing on the whole: there it is done where a few values lie near that line, as
after an earlier quantization, and where much is lost. Where codes are few, least squares gives the line that fits them
best, with what it loses, in closed form too; of its codes another line is kept, which does not make weights smaller.
With 2 bits much lies beyond the ends of codes; there parts of the range are tried instead. What each step brings:
docs/QUANTIZATION.md.
"""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx

from mlx_qwen35.conversion.passes import Column, Pack, Passes

# By how many codes the range of a group is wider than from the first code to the last, by bits and group size: up to
# half a code at either end is rounded as well as all else, and finer codes lose less.
_WIDER = {
    3: {32: 0.5, 64: 1.0, 128: 1.0}, 4: {32: 0.25, 64: 0.5, 128: 1.0}, 5: {32: 0.0, 64: 0.25, 128: 0.5},
    6: {32: 0.0, 64: 0.25, 128: 0.25}, 8: {32: 0.0, 64: 0.0, 128: 0.0},
}  # fmt: skip
_PARTS = (0.85, 0.68, 0.55)  # of the range, at 2 bits
_FEW = 3  # bits, up to which least squares are worth their time
_SMALLER = 4  # bits, up to which lines make weights smaller by a two-hundredth or more
_STEEPEST = 1.5  # by how much a line is made steeper, at most
_FAR = 1 << 12  # codes
_NOTHING = 1e-6  # of a group's squared error, in codes: MLX's line is exact where the weights lie on it
_SAMPLE = 8  # of so many values one is held against MLX's line first, where that does not pay on the whole
_NEAR = 0.04  # of a code squared; where weights have nothing to do with a line it is 1 / 12 in the mean
_FINE = 6  # bits, from which on it matters which floats of 16 bits there are beside a scale or bias
_SIGNIFICANT = {mx.bfloat16: 8, mx.float16: 11, mx.float32: 24}  # bits
_SMALLEST = 1e-7  # scale of mx.quantize
# Of cosine and sine in 1 - 4 |r| and r - 2 r |r|, by least squares.
_COSINE, _SINE = 12 / math.pi**2, 240 / math.pi**3


class Search:
    """A search in groups of weights [N, G]. All columns are [N], float32."""

    def __init__(self, passes: Passes, bits: int, dtype: mx.Dtype):
        """dtype: in which scales and biases are stored."""
        self._passes, self._bits, self._top = passes, bits, (1 << bits) - 1
        self._step = 1.25 * 2.0 ** -_SIGNIFICANT[dtype]  # from a float to the next one, as a share of it
        self._low, self._high = passes.ends()
        self._usual = usual(passes, self._low, self._high, self._top)

    def run(self, pack: Pack) -> tuple[Any, Column, Column]:
        """-> what pack() makes of codes, uint8 [.., G], scale, bias."""
        xp, passes = self._passes.xp, self._passes
        scale0, bias0 = self._usual
        few = self._bits == 2
        scale = xp.abs(scale0) if few else self._wider(_WIDER[self._bits][passes.size])
        # Values far from zero lose digits by being counted from there.
        self._centre = self._low * (xp.abs(self._low) > _FAR * xp.abs(scale))
        part = 1 if few or self._bits >= _FINE else _SAMPLE
        *sums, loss0 = passes.look(self._centre, 1 / scale, *self._line(scale0, bias0), part)
        square = scale0 * scale0
        if few:
            best = self._fit(scale0, bias0)
            for share in _PARTS:
                best = self._better(best, self._fit(*self._part(share)))
        else:
            best = self._shifted(scale, *sums)
        if self._bits >= _FINE:
            best = self._better((loss0 * square, scale0, bias0), best)
        if self._bits == _FEW:
            best = self._fit(*best[1:])
        kept_as = self._unbiased if self._bits <= _SMALLER else self._levelled
        loss, scale, bias, kept = kept_as(*best[1:], pack)
        # Where the guess was wrong, or the weights may lie near MLX's line, that is taken after all.
        most = loss / square + _NOTHING  # of its loss, in codes; that is more yet where it clips
        unsure = loss0 < most if part == 1 else (loss0 < passes.size / part * _NEAR) | (most > passes.size / 12)
        most = most * unsure * ((scale != scale0) | (bias != bias0))
        wrong, kept = passes.settle(kept, most, *self._line(scale0, bias0), self._top, pack)
        return kept, passes.choose(wrong, scale0, scale), passes.choose(wrong, bias0, bias)

    def _part(self, part: float) -> tuple[Column, Column]:
        """The scale and bias with which the codes take a part of the range, in its middle."""
        scale = self._nonzero(self._passes.rounded((self._high - self._low) * (part / self._top)))
        return scale, self._passes.rounded((self._low + self._high) * 0.5 - scale * (self._top / 2))

    def _wider(self, codes: float) -> Column:
        """The scale with which the range takes so many codes more than there are steps between codes."""
        xp, passes = self._passes.xp, self._passes
        wanted = (self._high - self._low) * (1 / (self._top + codes))
        scale = passes.rounded(wanted)
        if self._bits >= _FINE:  # it may be MLX's, which is measured anyway: then its neighbour on the other side
            other = passes.choose(scale > wanted, scale * (1 - self._step), scale * (1 + self._step))
            scale = passes.choose(scale == xp.abs(self._usual[0]), passes.rounded(other), scale)
        scale = self._nonzero(scale)
        # The bias is to be the end of the range that is nearer to zero, where floats lie closer.
        return passes.choose(xp.abs(self._high) < xp.abs(self._low), -scale, scale)

    def _shifted(self, scale: Column, r: Column, size: Column, r_size: Column) -> tuple[Column, Column, Column]:
        """What a scale with its best bias is guessed to lose, the scale, and that bias. r, size, r_size: sums of r, |r|
        and r |r| with this scale, counted from the centre."""
        xp, passes = self._passes.xp, self._passes
        cosine, sine = (passes.size - 4 * size) * _COSINE, (r - 2 * r_size) * _SINE
        depth = xp.sqrt(cosine * cosine + sine * sine) * (1 / math.pi**2)
        # The angle in turns: of the diamond and not of the circle, which is near enough.
        turns = sine / xp.maximum(xp.abs(cosine) + xp.abs(sine), 1e-12) * 0.25
        turns = passes.choose(cosine >= 0, turns, passes.choose(sine >= 0, 0.5 - turns, -0.5 - turns))
        first, last = ((end - self._centre) / scale for end in (self._low, self._high))
        centred = self._top / 2 - (first + last) * 0.5
        bias = passes.rounded(self._centre - scale * (xp.round(centred + turns) - turns))
        biases = [bias]
        if self._bits >= _FINE:  # biases are so coarse that one beside it may be better
            biases += [passes.rounded(bias * (1 + step)) for step in (-self._step, self._step)]
        best = None
        for bias in biases:
            shift = (self._centre - bias) / scale
            loss = passes.size / 12 - depth * (xp.cos((shift + turns) * (2 * math.pi)) if len(biases) > 1 else 1)
            ends = first + shift, last + shift
            for over in (-xp.minimum(*ends), xp.maximum(*ends) - self._top):
                loss = loss + (over * over - 0.25) * (over > 0.5)
            best = (loss, bias) if best is None else self._better(best, (loss, bias))
        return best[0] * scale * scale, scale, best[1]

    def _fit(self, scale: Column, bias: Column) -> tuple[Column, Column, Column]:
        """Of a line and the one that fits its codes best, both as they are stored, the better: what it loses with these
        codes, its scale, its bias."""
        (r, q, q_q, r_q, r_r), _ = self._sums(scale, bias)
        size = self._passes.size
        slope = 1 + (r_q - r * q / size) / self._passes.xp.maximum(q_q - q * q / size, 1e-6)
        found = self._through(scale, bias, slope, (r, q, q_q, r_q, r_r))
        return self._better((r_r * scale * scale, scale, bias), found)

    def _unbiased(self, scale: Column, bias: Column, pack: Pack) -> tuple[Any, ...]:
        """The line through a line's codes that gives weights back as large as they are, as _fit() has it; and what
        pack() makes of the codes.

        The one that fits best makes them smaller, by as much as is lost (of 2 bits a tenth): less is lost in all, but
        what is lost has the direction of the weights, and adds up from layer to layer. Here it has nothing to do with
        them: slope = variance of t / covariance of t and q.
        """
        sums, kept = self._sums(scale, bias, pack)
        r, q, q_q, r_q, r_r = sums
        xp, size = self._passes.xp, self._passes.size
        codes, both, rest = q_q - q * q / size, r_q - r * q / size, r_r - r * r / size
        slope = (codes + 2 * both + rest) / xp.maximum(codes + both, 1e-6)
        slope = xp.minimum(xp.maximum(slope, 1 / _STEEPEST), _STEEPEST)
        return *self._through(scale, bias, slope, sums), kept

    def _sums(self, scale: Column, bias: Column, pack: Pack | None = None) -> tuple[tuple[Column, ...], Any]:
        """Those of fit(), with codes counted from the middle: that leaves small numbers."""
        (r, q, q_q, r_q, r_r), kept = self._passes.fit(*self._line(scale, bias), self._top, pack)
        middle, size = self._top / 2, self._passes.size
        return (r, q - middle * size, q_q - middle * (2 * q - middle * size), r_q - middle * r, r_r), kept

    def _through(
        self, scale: Column, bias: Column, slope: Column, sums: tuple[Column, ...]
    ) -> tuple[Column, Column, Column]:
        """The line that is so much steeper, leaves a group its mean, and can be stored: what it loses with the codes
        that sums are of, its scale, its bias."""
        passes, size, middle = self._passes, self._passes.size, self._top / 2
        r, q, q_q, r_q, r_r = sums
        new = passes.rounded(scale * slope)
        new = passes.choose(new == 0, scale, new)
        slope = new / scale - 1
        height = (r - slope * q) / size
        at = passes.rounded(bias + scale * (middle + height) - new * middle)
        height = (at - bias + (new - scale) * middle) / scale
        loss = r_r - 2 * (slope * r_q + height * r) + slope * (slope * q_q + 2 * height * q) + size * height * height
        # Cancellation may leave less than nothing.
        return passes.xp.maximum(loss, 0.0) * scale * scale, new, at

    def _levelled(self, scale: Column, bias: Column, pack: Pack) -> tuple[Any, ...]:
        """As _unbiased() with the scale as it is, which is nearly so with more codes: what is left of a group has the
        mean zero, as far as it can be stored."""
        r, r_r, kept = self._passes.codes(*self._line(scale, bias), self._top, pack)
        at = self._passes.rounded(bias + scale * (r / self._passes.size))
        height = (at - bias) / scale
        loss = self._passes.xp.maximum(r_r - height * (2 * r - self._passes.size * height), 0.0)
        square = scale * scale
        return *self._better((r_r * square, scale, bias), (loss * square, scale, at)), kept

    def _line(self, scale: Column, bias: Column) -> tuple[Column, Column]:
        """A line as passes take it: t = ratio y + offset."""
        return 1 / scale, (self._centre - bias) / scale

    def _better(self, one: tuple[Column, ...], other: tuple[Column, ...]) -> tuple[Column, ...]:
        """Of two lines, what they lose being first, the one that loses less, group by group."""
        better = other[0] < one[0]
        return tuple(self._passes.choose(better, new, old) for new, old in zip(other, one, strict=True))

    def _nonzero(self, scale: Column) -> Column:
        return self._passes.choose(scale == 0, self._passes.xp.abs(self._usual[0]), scale)


def usual(passes: Passes, low: Column, high: Column, top: int) -> tuple[Column, Column]:
    """mx.quantize's scale and bias, as they are stored, of groups from `low` to `high`."""
    xp = passes.xp
    below = xp.abs(low) > xp.abs(high)
    scale = xp.maximum((high - low) / top, _SMALLEST)
    scale = passes.choose(below, scale, -scale)
    edge = passes.choose(below, low, high)
    code = xp.round(edge / scale)
    zero = code == 0
    scale = passes.choose(zero, scale, edge / (code + zero))
    return passes.rounded(scale), passes.rounded(edge * (code != 0))
