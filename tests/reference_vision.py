"""A plain NumPy vision tower in float64, one patch and one frame after the other, and positions token by token.

Knows the published names and the arithmetic of the architecture. Knows nothing of MLX or of this package, so that an
error in one is not an error in both.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .reference_numpy import Reference

Grid = tuple[int, int, int]


class VisionReference:
    """The tower of a config.json with a vision_config (tests.checkpoints.tiny_config) and its HF tensors."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]):
        self.config = config["vision_config"]
        prefix = "model.visual."
        self.tensors = {n.removeprefix(prefix): np.float64(t) for n, t in tensors.items() if n.startswith(prefix)}

    def features(self, pixels: np.ndarray, grid: Grid) -> np.ndarray:
        """pixels [t * h * w, C * T * P * P] -> [t * h * w / merge^2, H]."""
        frames, height, width = grid
        return np.concatenate([self.frame(p, height, width) for p in np.split(np.float64(pixels), frames)])

    def frame(self, pixels, height, width):
        c, merge = self.config, self.config["spatial_merge_size"]
        places = [
            (top + i, left + j)
            for top in range(0, height, merge) for left in range(0, width, merge)
            for i in range(merge) for j in range(merge)
        ]  # fmt: skip
        kernel = self.tensors["patch_embed.proj.weight"]
        x = pixels @ kernel.reshape(len(kernel), -1).T + self.tensors["patch_embed.proj.bias"]
        x = x + np.array([self.position(row, height, column, width) for row, column in places])
        for n in range(c["depth"]):
            x = x + self.attention(self.norm(x, f"blocks.{n}.norm1"), f"blocks.{n}.attn.", places)
            h = self.linear(self.norm(x, f"blocks.{n}.norm2"), f"blocks.{n}.mlp.linear_fc1")
            h = 0.5 * h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
            x = x + self.linear(h, f"blocks.{n}.mlp.linear_fc2")
        x = self.norm(x, "merger.norm").reshape(len(x) // merge**2, -1)
        h = self.linear(x, "merger.linear_fc1")
        h = 0.5 * h * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
        return self.linear(h, "merger.linear_fc2")

    def position(self, row, height, column, width):
        side = math.isqrt(self.config["num_position_embeddings"])
        table = self.tensors["pos_embed.weight"].reshape(side, side, -1)
        y, x = row * (side - 1) / (height - 1), column * (side - 1) / (width - 1)
        total = 0
        for r in (math.floor(y), math.floor(y) + 1):
            for s in (math.floor(x), math.floor(x) + 1):
                share = max(0, 1 - abs(y - r)) * max(0, 1 - abs(x - s))
                if share:
                    total = total + share * table[r, s]
        return total

    def attention(self, x, name, places):
        heads, length = self.config["num_heads"], len(x)
        q, k, v = self.linear(x, name + "qkv").reshape(length, 3, heads, -1).transpose(1, 2, 0, 3)
        q, k = self.turn(q, places), self.turn(k, places)
        out = np.zeros_like(v)
        for h in range(heads):
            scores = q[h] @ k[h].T / math.sqrt(q.shape[-1])
            chances = np.exp(scores - scores.max(axis=1, keepdims=True))
            out[h] = chances / chances.sum(axis=1, keepdims=True) @ v[h]
        return self.linear(out.transpose(1, 0, 2).reshape(length, -1), name + "proj")

    @staticmethod
    def turn(x, places):
        """x [heads, N, D]: pair (j, j + D/2) turns by the row for j < D/4, by the column after, ever slower."""
        half = x.shape[-1] // 2
        out = x.copy()
        for n, place in enumerate(places):
            for j in range(half):
                axis, step = divmod(j, half // 2)
                angle = place[axis] * 10000 ** (-2 * step / half)
                a, b = x[:, n, j], x[:, n, j + half]
                out[:, n, j] = a * math.cos(angle) - b * math.sin(angle)
                out[:, n, j + half] = b * math.cos(angle) + a * math.sin(angle)
        return out

    def norm(self, x, name):
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-6)
        return x * self.tensors[name + ".weight"] + self.tensors[name + ".bias"]

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T + self.tensors[name + ".bias"]


def walk(tokens: Sequence[int], grids: Mapping[int, Sequence[Grid]], merge: int) -> tuple[np.ndarray, int]:
    """Positions [3, T] and the rope delta, found token by token. grids: by placeholder id, in the prompt's order."""
    runs = {token: [(h // merge, w // merge) for t, h, w in own for _ in range(t)] for token, own in grids.items()}
    positions, at, n = [], 0, 0
    while n < len(tokens):
        if runs.get(tokens[n]):
            height, width = runs[tokens[n]].pop(0)
            positions += [(at, at + row, at + column) for row in range(height) for column in range(width)]
            n += height * width
            at += max(height, width)
        else:
            positions.append((at, at, at))
            at, n = at + 1, n + 1
    return np.array(positions).T, at - len(tokens)


class SeeingReference:
    """The whole model: text, images and videos."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]):
        self.config, self.vision = config, VisionReference(config, tensors)
        prefix = "model.language_model."
        self.tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith((prefix, "lm_head"))}

    def logits(self, tokens: Sequence[int], media: Sequence[Any] = ()) -> np.ndarray:
        """tokens [T] -> logits [T, vocab]; media: anything with kind, pixels and grid, in the order of the prompt."""
        c, kinds = self.config, ("image", "video")
        ids = {kind: c[f"{kind}_token_id"] for kind in kinds}
        positions, _ = walk(
            tokens, {ids[kind]: [m.grid for m in media if m.kind == kind] for kind in kinds},
            c["vision_config"]["spatial_merge_size"],
        )  # fmt: skip
        # Features become further words of the table, and the placeholders are those words.
        table, tokens = self.tensors["embed_tokens.weight"], np.array(tokens)
        for kind in kinds:
            shown = [self.vision.features(m.pixels, m.grid) for m in media if m.kind == kind]
            if shown:
                tokens[tokens == ids[kind]] = np.arange(sum(map(len, shown))) + len(table)
                table = np.concatenate([table, *shown])
        vocab = len(self.tensors["embed_tokens.weight"])
        text = Reference(c["text_config"], self.tensors | {"embed_tokens.weight": table})
        return text.logits(tokens, positions)[:, :vocab]
