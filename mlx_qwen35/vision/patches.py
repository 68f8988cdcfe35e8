"""Pictures of whole patches to patch rows, as levels, in one pass over the memory of the rows.

Knows how a checkpoint wants patches cut, ordered and normalized. Knows nothing of sizes, files or time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.vision.media import Levels

if TYPE_CHECKING:
    from PIL import Image

_BICUBIC = 3  # as PIL and the preprocessor files number it


@dataclass(frozen=True)
class Patches:
    """How a preprocessor file cuts pictures; sizes in pixels, merge_size in patches, temporal_size in frames."""

    patch_size: int
    merge_size: int
    temporal_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    min_pixels: int
    max_pixels: int

    @property
    def factor(self) -> int:
        """What the sides of a picture must be multiples of."""
        return self.patch_size * self.merge_size

    def empty_rows(self, frames: int, height: int, width: int) -> np.ndarray:
        """[t, h/m, w/m, m, m, C, frames of a group, p * p] uint8, for `write` to fill; sides are whole patches"""
        m, p = self.merge_size, self.patch_size
        groups = -(-frames // self.temporal_size)
        blocks = (groups, height // self.factor, width // self.factor)
        return np.empty((*blocks, m, m, len(self.mean), self.temporal_size, p * p), dtype=np.uint8)

    def write(self, image: Image.Image, rows: np.ndarray, frames: range) -> None:
        """Puts one RGB picture [H, W] into `rows` (of `empty_rows`) as the frames numbered `frames`.

        A run of patch_size pixels moves as one item, one block of rows at a time:

            plane [H, W] -> (m, p, w/m, m) runs of p levels -> (w/m, m, m, p) runs = (w/m, m, m, p * p) levels
        """
        m, p = self.merge_size, self.patch_size
        run = np.dtype(f"V{p}")
        runs = rows.view(run)  # [t, h/m, w/m, m, m, C, frames of a group, p]
        _, bands, blocks, *_ = rows.shape
        for c, plane in enumerate(image.split()):
            strips = np.asarray(plane).view(run).reshape(bands, m, p, blocks, m)
            for band, strip in enumerate(strips.transpose(0, 3, 1, 4, 2)):
                for frame in frames:
                    group, place = divmod(frame, self.temporal_size)
                    runs[group, band, ..., c, place, :] = strip

    def flat(self, rows: np.ndarray) -> tuple[Levels, tuple[int, int, int]]:
        """-> ([t*h*w, C * temporal * p * p], (t, h, w) in patches), without a copy"""
        t, blocks_high, blocks_wide, m, _, channels, temporal, area = rows.shape
        grid = (t, blocks_high * m, blocks_wide * m)
        return Levels(rows.reshape(math.prod(grid), channels * temporal * area), self.mean, self.std), grid


def read_patches(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The fields of Patches, from the content of a preprocessor file; `where` names it. Pixel limits are
    size.shortest_edge and size.longest_edge; min_pixels and max_pixels go before them. Raises CheckpointError for a key
    that is missing or wrong, and for a way of preparing pictures that this family does not have."""
    for key, only in (("do_resize", True), ("do_rescale", True), ("do_normalize", True), ("resample", _BICUBIC)):
        if config.get(key, only) != only:
            raise CheckpointError(f"{where}: {key} is {config[key]!r}; only {only!r} is supported")
    scale = config.get("rescale_factor", 1 / 255)
    if not isinstance(scale, (int, float)) or not math.isclose(scale, 1 / 255, rel_tol=1e-6):
        raise CheckpointError(f"{where}: rescale_factor is {scale!r}; only 1/255 is supported")
    size = config.get("size") or {}
    if not isinstance(size, Mapping):
        raise CheckpointError(f"{where}: size is {size!r}; it must have shortest_edge and longest_edge")
    limits = {
        "min_pixels": config.get("min_pixels") or size.get("shortest_edge"),
        "max_pixels": config.get("max_pixels") or size.get("longest_edge"),
    }
    sizes = {key: config.get(key) for key in ("patch_size", "merge_size", "temporal_patch_size")} | limits
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise CheckpointError(f"{where}: {key} is {value!r}; it must be a positive whole number: replace it")
    if sizes["min_pixels"] > sizes["max_pixels"]:
        raise CheckpointError(f"{where}: at least {sizes['min_pixels']} pixels and at most {sizes['max_pixels']}")
    return {
        "patch_size": sizes["patch_size"],
        "merge_size": sizes["merge_size"],
        "temporal_size": sizes["temporal_patch_size"],
        "mean": _colours(config, "image_mean", where),
        "std": _colours(config, "image_std", where),
        **limits,
    }


def _colours(config: Mapping[str, Any], key: str, where: str) -> tuple[float, ...]:
    values = config.get(key)
    numbers = isinstance(values, (list, tuple)) and all(type(v) in (int, float) and math.isfinite(v) for v in values)
    if not numbers or len(values) != 3 or (key == "image_std" and min(values) <= 0):
        raise CheckpointError(f"{where}: {key} is {values!r}; three numbers are due, one for each of red, green, blue")
    return tuple(float(value) for value in values)
