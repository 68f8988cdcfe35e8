"""The vision tower: patches of frames -> features of the text model's width.

Knows its layers, which patches see each other (those of one frame pair), and how much is in memory at once.
Knows no files, no tokens and no positions in text. Rows of patches come in the processor's order, in which the
merge x merge patches that become one feature lie next to each other:

    a frame of 4 x 4 patches, merge 2:    0  1 |  4  5
                                          2  3 |  6  7
                                         -------------
                                          8  9 | 12 13
                                         10 11 | 14 15
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..config import VisionConfig
from ..kernels.activation import fused
from .media import Levels

_EPS = 1e-6
_THETA = 10000
_ON_GPU = mx.default_device().type == mx.gpu
# What is done at once: enough to fill a GPU; on a CPU what about fits its cache, and less memory to be handed out.
_MOST_PATCHES = 2**13 if _ON_GPU else 2**11  # of a group of frames; one larger frame is gone through in parts
_MOST_ACTIVATIONS = 2**27 if _ON_GPU else 2**22  # inside an MLP
_MOST_SCORES = 2**26 if _ON_GPU else 2**22  # where MLX lays them out
_LEAST_ROWS = 2**8  # of queries at once, or more time goes into reading the keys than into products
_FUSED_HEADS = (64, 80, 128)  # head sizes whose scores a GPU never lays out

Grid = tuple[int, int, int]
Rows = np.ndarray | Levels


class VisionTower(nn.Module):
    """Patch embedding, transformer blocks, merger; computes in the dtype of its weights."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.patch_size = config.in_channels * config.temporal_patch_size * config.patch_size**2
        self.patch_embed = PatchEmbedding(self.patch_size, config.hidden_size)
        self.pos_embed = nn.Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = [VisionBlock(config) for _ in range(config.depth)]
        self.merger = Merger(config)

    def encode(self, pixels: Sequence[Rows], grids: Sequence[Grid]) -> list[mx.array]:
        """Features [t * h * w / merge^2, H] of each medium. pixels[n]: [t * h * w, C * T * P * P] for grid (t, h, w).

        Frames of one size go through together, whichever medium they are from, in groups; each group is evaluated
        before the one after the next is begun, so that neither activations nor pixels of all of them exist at once.
        """
        for rows, (pairs, height, width) in zip(pixels, grids, strict=True):
            if rows.shape != (pairs * height * width, self.patch_size):
                raise ValueError(
                    f"pixels of grid {(pairs, height, width)} are {list(rows.shape)}, "
                    f"expected {[pairs * height * width, self.patch_size]}"
                )
        dtype = self.merger.norm.weight.dtype
        found: list[list[mx.array]] = [[] for _ in grids]
        pending = None
        for height, width in dict.fromkeys(grid[1:] for grid in grids):
            patches = height * width
            rows, columns = block_order(height, width, self.config.spatial_merge_size)
            rope = _angles(rows, columns, self.config.hidden_size // self.config.num_heads)
            positions = self._position_embedding(rows, columns, height, width).astype(dtype)
            for group in _groups(grids, height, width, max(1, _MOST_PATCHES // patches)):
                spans = [(pixels[n], start * patches, stop * patches) for n, start, stop in group]
                x = self._embedded(spans, dtype).reshape(-1, patches, self.config.hidden_size) + positions
                for block in self.blocks:
                    x = block(x, rope)
                features = self.merger(x)
                done = 0
                for n, start, stop in group:
                    found[n].append(features[done : done + stop - start].reshape(-1, features.shape[-1]))
                    done += stop - start
                mx.async_eval([found[n][-1] for n, _, _ in group])
                if pending is not None:
                    mx.eval(pending)
                pending = features
        joined = [parts[0] if len(parts) == 1 else mx.concatenate(parts) for parts in found]
        mx.eval(joined)
        return joined

    def _embedded(self, spans: Sequence[tuple[Rows, int, int]], dtype: mx.Dtype) -> mx.array:
        """The rows start:stop of each, together [N, Vh]; pixel values exist for a part of a large frame at a time."""
        if len(spans) > 1:
            return self.patch_embed(mx.array(np.concatenate([rows[at:end] for rows, at, end in spans])).astype(dtype))
        [(rows, start, stop)] = spans

        def embedded(at: int, end: int) -> mx.array:
            return self.patch_embed(mx.array(rows[start + at : start + end]).astype(dtype))

        return _in_turn(embedded, _spans(stop - start, _MOST_PATCHES), axis=0)

    def _position_embedding(self, rows: np.ndarray, columns: np.ndarray, height: int, width: int) -> mx.array:
        """The square table stretched over height x width patches, corner on corner: [height * width, Vh] float32."""
        side = math.isqrt(self.config.num_position_embeddings)
        table = self.pos_embed(mx.arange(side * side)).astype(mx.float32).reshape(side, side, -1)
        top, bottom, down = _stretched(side, height)
        left, right, across = _stretched(side, width)
        lines = table[top] * (1 - down) + table[bottom] * down  # [height, side, Vh]

        def at(start: int, stop: int) -> mx.array:
            row, column = mx.array(rows[start:stop]), mx.array(columns[start:stop])
            share = across[column, :, 0]  # [n, 1]
            return lines[row, left[column]] * (1 - share) + lines[row, right[column]] * share

        return _in_turn(at, _spans(len(rows), _MOST_PATCHES), axis=0)


class PatchEmbedding(nn.Module):
    """The convolution of the published weights, whose stride is its kernel: a matmul."""

    def __init__(self, patch_size: int, hidden_size: int):
        super().__init__()
        self.proj = nn.Linear(patch_size, hidden_size)

    def __call__(self, pixels: mx.array) -> mx.array:
        """pixels [F, N, C * T * P * P] -> [F, N, Vh]."""
        return self.proj(pixels)


class VisionBlock(nn.Module):
    """x += attention(norm1(x)); x += mlp(norm2(x))."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.attn = VisionAttention(config.hidden_size, config.num_heads)
        self.mlp = VisionMLP(config.hidden_size, config.intermediate_size)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        """x [F, N, Vh] -> [F, N, Vh]; rope: cos, sin [N, 1, head size / 2]."""
        x = x + self.attn(self.norm1(x), rope)
        rows = x.reshape(-1, x.shape[-1])  # [F * N, Vh]
        spans = _spans(len(rows), max(1, _MOST_ACTIVATIONS // self.mlp.width))

        def after_mlp(start: int, stop: int) -> mx.array:
            part = rows[start:stop]
            return part + self.mlp(self.norm2(part))

        return _in_turn(after_mlp, spans, axis=0).reshape(x.shape)


class VisionAttention(nn.Module):
    """Every patch of a frame pair reads all patches of it."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def __call__(self, x: mx.array, rope: tuple[mx.array, mx.array]) -> mx.array:
        """x [F, N, Vh] -> [F, N, Vh]; rope: cos, sin [N, 1, head size / 2]."""
        frames, patches, hidden = x.shape

        def projected(start: int, stop: int) -> mx.array:
            part = self.qkv(x[:, start:stop]).reshape(frames, stop - start, 3 * self.heads, -1)
            turned, values = mx.split(part, [2 * self.heads], axis=2)
            return mx.concatenate([_rotate(turned, *(a[start:stop] for a in rope)), values], axis=2)

        qkv = _in_turn(projected, _spans(patches, _MOST_PATCHES), axis=1).swapaxes(1, 2)  # [F, 3 * heads, N, D]
        attended = full_attention(*mx.split(qkv, 3, axis=1))
        return self.proj(attended.swapaxes(1, 2).reshape(frames, patches, hidden))


class VisionMLP(nn.Module):
    """fc2(gelu(fc1(x))), the gelu by its tanh approximation."""

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.width = intermediate_size
        self.linear_fc1 = nn.Linear(hidden_size, intermediate_size)
        self.linear_fc2 = nn.Linear(intermediate_size, hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear_fc2(_gelu_tanh(self.linear_fc1(x)))


class Merger(nn.Module):
    """merge^2 neighbouring patches -> one feature of the text model's width; its gelu is exact."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.merged = config.hidden_size * config.spatial_merge_size**2
        self.norm = nn.LayerNorm(config.hidden_size, eps=_EPS)
        self.linear_fc1 = nn.Linear(self.merged, self.merged)
        self.linear_fc2 = nn.Linear(self.merged, config.out_hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        """x [F, N, Vh] -> [F, N / merge^2, H]."""
        x = self.norm(x).reshape(x.shape[0], -1, self.merged)
        return self.linear_fc2(_gelu(self.linear_fc1(x)))


def full_attention(
    queries: mx.array, keys: mx.array, values: mx.array, *, most_scores: int = _MOST_SCORES
) -> mx.array:
    """softmax(q k^T / sqrt(D)) v of [F, heads, N, D] each.

    Where a GPU has no kernel that does without laying the scores out, about `most_scores` of them exist at once: those
    of some heads, or of some queries of one head.
    """
    frames, heads, patches, dim = queries.shape
    fits = next((size for size in _FUSED_HEADS if size >= dim), None)
    on_gpu = mx.default_device().type == mx.gpu and queries.dtype != mx.float32
    attend = partial(mx.fast.scaled_dot_product_attention, scale=dim**-0.5)
    if on_gpu and fits:
        if fits > dim:  # zeros up to a head size that has a kernel change nothing
            queries, keys, values = (mx.pad(a, [(0, 0)] * 3 + [(0, fits - dim)]) for a in (queries, keys, values))
        return attend(queries, keys, values)[..., :dim]
    rows = min(patches, max(_LEAST_ROWS, most_scores // patches))
    together = max(1, most_scores // (rows * patches))
    queries, keys, values = (a.reshape(1, frames * heads, patches, dim) for a in (queries, keys, values))

    def of_heads(first: int, last: int) -> mx.array:
        k, v = (mx.contiguous(a[:, first:last]) for a in (keys, values))
        tiles = _spans(patches, rows)
        return _in_turn(lambda start, stop: attend(queries[:, first:last, start:stop], k, v), tiles, axis=2)

    return _in_turn(of_heads, _spans(frames * heads, together), axis=1).reshape(frames, heads, patches, dim)


def _in_turn(function: Callable[..., mx.array], parts: Sequence[tuple[Any, ...]], axis: int) -> mx.array:
    """function(*part) of all parts, concatenated; what it needs on the way exists for two of them at a time."""
    found: list[mx.array] = []
    for part in parts:
        found.append(function(*part))
        if len(parts) > 1:
            mx.async_eval(found[-1])
            mx.eval(found[-2:-1])
    return found[0] if len(found) == 1 else mx.concatenate(found, axis=axis)


def _spans(length: int, most: int) -> list[tuple[int, int]]:
    """0..length in spans (start, stop) of `most`, the last shorter"""
    return [(start, min(start + most, length)) for start in range(0, length, most)]


def block_order(height: int, width: int, merge: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each of height * width patches, in the order in which they come (drawn above)."""
    rows, columns = np.indices((height, width), np.int32).reshape(2, height // merge, merge, width // merge, merge)
    return tuple(a.swapaxes(1, 2).reshape(-1) for a in (rows, columns))


def _groups(grids: Sequence[Grid], height: int, width: int, size: int) -> Iterator[list[tuple[int, int, int]]]:
    """Groups of at most `size` frames of height x width, as spans (medium, first frame, past the last)."""
    group: list[tuple[int, int, int]] = []
    room = size
    for n, (pairs, *sides) in enumerate(grids):
        start = 0 if sides == [height, width] else pairs
        while start < pairs:
            stop = min(pairs, start + room)
            group.append((n, start, stop))
            room -= stop - start
            start = stop
            if room == 0:
                yield group
                group, room = [], size
    if group:
        yield group


def _stretched(side: int, length: int) -> tuple[mx.array, mx.array, mx.array]:
    """Between which two of `side` entries each of `length` points lies: low, high [length], and how far beyond the
    low one, float32 [length, 1, 1]; the first point is on the first entry and the last on the last."""
    point = np.linspace(0, side - 1, length, dtype=np.float32)
    low = point.astype(np.int32)
    high = np.minimum(low + 1, side - 1)
    return mx.array(low), mx.array(high), mx.array((point - low)[:, None, None])


def _angles(rows: np.ndarray, columns: np.ndarray, head_dim: int) -> tuple[mx.array, mx.array]:
    """cos, sin [N, 1, head_dim / 2] float32: the row turns the first half of the pairs, the column the other."""
    frequencies = (_THETA ** (-np.arange(0, head_dim // 2, 2) / (head_dim // 2))).astype(np.float32)
    angles = np.concatenate([rows[:, None] * frequencies, columns[:, None] * frequencies], axis=-1)
    angles = mx.array(angles.astype(np.float32))[:, None]
    return mx.cos(angles), mx.sin(angles)


def _rotate(x: mx.array, cos: mx.array, sin: mx.array) -> mx.array:
    """Turn the pairs (j, j + D / 2) of x [F, N, heads, D] by cos, sin [N, 1, D / 2]."""
    return mx.concatenate(_turned(*mx.split(x, 2, axis=-1), cos, sin), axis=-1)


@fused
def _turned(a: mx.array, b: mx.array, cos: mx.array, sin: mx.array) -> tuple[mx.array, mx.array]:
    """Both halves of the pairs turned; float32 inside, because cos and sin are."""
    return (a * cos - b * sin).astype(a.dtype), (b * cos + a * sin).astype(a.dtype)


@fused
def _gelu_tanh(x: mx.array) -> mx.array:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 in float32, in the dtype of x."""
    exact = x.astype(mx.float32)
    inner = math.sqrt(2 / math.pi) * (exact + 0.044715 * exact * exact * exact)
    return (0.5 * exact * (1 + mx.tanh(inner))).astype(x.dtype)


@fused
def _gelu(x: mx.array) -> mx.array:
    """x (1 + erf(x / sqrt(2))) / 2 in float32, in the dtype of x."""
    exact = x.astype(mx.float32)
    return (0.5 * exact * (1 + mx.erf(exact * math.sqrt(0.5)))).astype(x.dtype)
