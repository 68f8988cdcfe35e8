"""Better than rounding to nearest: the scale and bias of each group that lose least, in MLX's affine format.

Knows numbers in groups. Knows no modules and no files. mx.quantize spreads the codes over a group's whole range and
rounds the scale to 16 bits only after the codes are chosen. Here several narrower ranges are tried, each with the line
through its codes that fits best, and codes always belong to the scales that are stored. MLX's own choice is among what
is tried, so that no group gets worse.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_qwen35.checkpoint import quantize as nearest
from mlx_qwen35.config import QuantSpec

# Parts of a group's range that are tried, by bits: the fewer the codes, the more it pays to give up what lies far out.
_PARTS = {
    2: (1.0, 0.83, 0.69, 0.57, 0.46), 3: (1.0, 0.89, 0.78, 0.67, 0.56), 4: (1.0, 0.93, 0.86, 0.78, 0.7),
    5: (1.0, 0.94, 0.88, 0.82), 6: (1.0, 0.94, 0.88), 8: (1.0,),
}  # fmt: skip
_SLAB = {mx.cpu: 1 << 16, mx.gpu: 1 << 24}  # values worked on at once: on a CPU they stay in its cache


def pack(
    weight: mx.array, spec: QuantSpec, *, dtype: mx.Dtype | None = None, search: bool = False
) -> dict[str, mx.array]:
    """What quantize.pack() gives; search: with scales and biases that lose less, which takes longer, where the mode has
    them (affine)."""
    if not search or spec.mode != "affine":
        return nearest.pack(weight, spec, dtype=dtype)
    arrays = quantize(weight, spec.group_size, spec.bits, dtype or weight.dtype)
    return dict(zip(("weight", "scales", "biases"), arrays, strict=True))


def quantize(
    weight: mx.array, group_size: int, bits: int, dtype: mx.Dtype
) -> tuple[mx.array, mx.array, mx.array]:
    """weight [.., in] -> codes packed as mx.quantize packs them, uint32 [.., in * bits / 32], and scales and biases
    [.., in / group_size] in `dtype`."""
    outer = weight.shape[:-1]
    scales, biases = (part.astype(dtype).reshape(-1, 1) for part in mx.quantize(weight, group_size, bits)[1:])
    x = weight.reshape(-1, group_size)
    step = max(1, _SLAB[mx.default_device().type] // group_size)
    found = []
    for start in range(0, len(x), step):
        rows = slice(start, start + step)
        codes, *line = _search(x[rows], bits, scales[rows], biases[rows])
        found.append((_packed(codes, bits), *line))
        mx.eval(found[-1])
    words, scales, biases = (mx.concatenate(parts).reshape(*outer, -1) for parts in zip(*found, strict=True))
    return words, scales, biases


def _search(x: mx.array, bits: int, scale: mx.array, bias: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """x [N, G], scale and bias [N, 1] as MLX has them -> codes [N, G], scale, bias: the best that is found."""
    dtype, top = scale.dtype, (1 << bits) - 1
    x = x.astype(mx.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    middle, half = (low + high) / 2, (high - low) / 2
    mean = x.mean(-1, keepdims=True)
    best = None

    def attempt(s: mx.array, b: mx.array) -> tuple[mx.array, mx.array]:
        """Keep a line if it is the best so far; the line that fits its codes best."""
        nonlocal best
        s, b = s.astype(dtype).astype(mx.float32), b.astype(dtype).astype(mx.float32)
        codes = _codes(x, s, b, top)
        error = mx.square(codes * s + b - x).sum(-1, keepdims=True)
        if best is None:
            best = error, s, b
        else:
            better = error < best[0]
            best = tuple(mx.where(better, new, old) for new, old in zip((error, s, b), best, strict=True))
        middle_code = codes.mean(-1, keepdims=True)
        codes = codes - middle_code
        s = (codes * (x - mean)).sum(-1, keepdims=True) / mx.maximum((codes * codes).sum(-1, keepdims=True), 1e-12)
        return s, mean - s * middle_code

    attempt(*attempt(scale, bias))
    for part in _PARTS[bits]:
        attempt(*attempt(2 * part / top * half, middle - part * half))
    _, s, b = best
    return _codes(x, s, b, top), s.astype(dtype), b.astype(dtype)


def _codes(x: mx.array, scale: mx.array, bias: mx.array, top: int) -> mx.array:
    return mx.clip(mx.round((x - bias) / mx.where(scale == 0, 1, scale)), 0, top)


def _packed(codes: mx.array, bits: int) -> mx.array:
    """Codes [.., in] -> uint32 [.., in * bits / 32]: a stream of bits, the first code in the lowest.

    Eight codes of b bits are b bytes:     codes 7 6 5 4 3 2 1 0   (3 bits each)
                                           bytes |  2  |  1  |  0  |
    """
    *outer, width = codes.shape
    eights = codes.astype(mx.uint64).reshape(*outer, width // 8, 8)
    words = (eights << (mx.arange(8, dtype=mx.uint64) * bits)).sum(-1)
    octets = words[..., None].view(mx.uint8)[..., :bits]  # little-endian
    return mx.contiguous(octets.reshape(*outer, width * bits // 8)).view(mx.uint32)
