"""One picture or video as the vision tower takes it: patch rows, their grid, and the times of a video's frame pairs.

Knows arrays, and by what two equal pictures are recognized. Knows nothing of files, of PIL or of the model.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from mlx_qwen35.errors import PromptError


@dataclass(frozen=True, eq=False)
class Media:
    """A prepared picture or video; immutable.

    pixels: [t*h*w, C * temporal * patch * patch] float32; the rows in the order (t, h/merge, w/merge, merge, merge), so
        that the rows of one token lie together; in a row (channel, frame, row, column).
    grid: (t, h, w) in patches; t = 1 for an image, the number of frame pairs for a video.
    timestamps: seconds, one a frame pair; empty for an image.
    Raises PromptError where the sizes do not fit together.
    """

    kind: Literal["image", "video"]
    pixels: np.ndarray
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
        pixels = np.ascontiguousarray(self.pixels, dtype=np.float32).view()
        if pixels.ndim != 2 or len(pixels) != t * h * w:
            raise PromptError(f"pixels {list(pixels.shape)} do not fit the grid {self.grid}: {t * h * w} rows are due")
        pixels.flags.writeable = False  # `key` stands for them from now on
        object.__setattr__(self, "pixels", pixels)
        object.__setattr__(self, "grid", (t, h, w))

    @property
    def tokens(self) -> int:
        """How many rows of the prompt it fills."""
        t, h, w = self.grid
        return t * h * w // self.merge_size**2

    @cached_property
    def key(self) -> str:
        """Equal for equal pixels, kind and grid, and for nothing else; made when first asked for."""
        digest = hashlib.sha256(f"{self.kind} {self.grid} {self.merge_size} ".encode())
        digest.update(self.pixels)
        return digest.hexdigest()
