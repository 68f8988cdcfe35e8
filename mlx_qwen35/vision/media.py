"""One picture or video as the vision tower takes it: patch rows, their grid, and the times of a video's frame pairs.

Knows arrays, how levels stand for pixel values, and by what two equal pictures are recognized. Knows nothing of files,
of PIL or of the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np

from mlx_qwen35.errors import PromptError


@dataclass(frozen=True, eq=False)
class Levels:
    """Patch rows as whole levels 0..255, which take a quarter of the room of the pixel values that they stand for.

    levels: [rows, C * temporal * patch * patch] uint8, channels first; mean, std: of each channel.
    rows[start:stop] are pixel values, float32: bit for bit what the published processor computes in float32,
    (level / 255 - mean) / std.
    """

    levels: np.ndarray
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.levels.shape

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, part: slice) -> np.ndarray:
        mean, std = (np.array(numbers, dtype=np.float32)[:, None] for numbers in (self.mean, self.std))
        levels = self.levels[part]
        values = np.divide(levels, np.float32(255), dtype=np.float32)
        channels = values.reshape(len(values), len(mean), -1)  # [n, C, temporal * p * p]
        np.subtract(channels, mean, out=channels)
        np.divide(channels, std, out=channels)
        return values


@dataclass(frozen=True, eq=False)
class Media:
    """A prepared picture or video; immutable.

    rows: [t*h*w, C * temporal * patch * patch], as Levels or as float32 pixel values; in the order (t, h/merge,
        w/merge, merge, merge), so that the rows of one token lie together; in a row (channel, frame, row, column).
    grid: (t, h, w) in patches; t = 1 for an image, the number of frame pairs for a video.
    timestamps: seconds, one a frame pair; empty for an image.
    Raises PromptError where the sizes do not fit together.
    """

    kind: Literal["image", "video"]
    rows: np.ndarray | Levels
    grid: tuple[int, int, int]
    timestamps: tuple[float, ...] = ()
    merge_size: int = 2

    def __post_init__(self) -> None:
        if self.kind not in ("image", "video"):
            raise PromptError(f"media are of kind 'image' or 'video', not {self.kind!r}")
        if len(self.grid) != 3 or min(self.grid) < 1:
            raise PromptError(f"the grid of {self.kind} pixels is (t, h, w), each at least 1, not {self.grid}")
        t, h, w = (int(side) for side in self.grid)
        if h % self.merge_size or w % self.merge_size:
            raise PromptError(f"a grid of {h} x {w} patches cannot be merged {self.merge_size} x {self.merge_size}")
        if self.kind == "image" and (t != 1 or self.timestamps):
            raise PromptError(f"an image has t = 1 and no timestamps, not t = {t} and {len(self.timestamps)}")
        if self.timestamps and len(self.timestamps) != t:
            raise PromptError(f"{len(self.timestamps)} timestamps for {t} frame pairs; give one for each")
        given = self.rows.levels if isinstance(self.rows, Levels) else self.rows
        kept = np.ascontiguousarray(given, dtype=np.uint8 if isinstance(self.rows, Levels) else np.float32).view()
        if kept.ndim != 2 or len(kept) != t * h * w:
            raise PromptError(f"pixels {list(kept.shape)} do not fit the grid {self.grid}: {t * h * w} rows are due")
        kept.flags.writeable = False  # `key` stands for them from now on
        rows = replace(self.rows, levels=kept) if isinstance(self.rows, Levels) else kept
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "grid", (t, h, w))

    @property
    def pixels(self) -> np.ndarray:
        """All pixel values, float32, not to be written to. Of Levels they are made each time; `rows` makes some."""
        values = self.rows[:]
        values.flags.writeable = False
        return values

    @property
    def tokens(self) -> int:
        """How many rows of the prompt it fills."""
        t, h, w = self.grid
        return t * h * w // self.merge_size**2

    @cached_property
    def key(self) -> str:
        """Equal for equal rows, kind and grid, and for nothing else; made when first asked for."""
        values, meaning = self.rows, ""
        if isinstance(self.rows, Levels):
            values, meaning = self.rows.levels, f"levels {self.rows.mean} {self.rows.std}"
        digest = hashlib.sha256(f"{self.kind} {self.grid} {self.merge_size} {meaning} ".encode())
        digest.update(values)
        return digest.hexdigest()
