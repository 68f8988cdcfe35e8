"""Small pictures of what a prompt showed, as a model sees it. Knows how patches lie and how HTML carries a picture."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

import numpy as np

from mlx_qwen35.vision.media import Levels, Media

LONGEST_SIDE = 160  # pixels
MOST_FRAMES = 4
_TEMPORAL = 2  # frames of a patch


def thumbnails(media: Sequence[Media]) -> str:
    """One line of HTML with every picture, and some frames of every video; "" for none."""
    return " ".join(_tag(url, medium) for medium in media for url in data_urls(medium))


def data_urls(medium: Media) -> list[str]:
    """The picture, or up to MOST_FRAMES frames over the length of a video, as small JPEGs in data: URLs."""
    pairs = medium.grid[0]
    chosen = sorted({round(at) for at in np.linspace(0, pairs - 1, min(pairs, MOST_FRAMES))})
    return [_jpeg(frame(medium, pair)) for pair in chosen]


def frame(medium: Media, pair: int = 0) -> np.ndarray:
    """The first frame of a frame pair, [H, W, C] uint8. Pixel values without levels are stretched to fill 0..255."""
    _, height, width = medium.grid
    merge, rows = medium.merge_size, slice(pair * height * width, (pair + 1) * height * width)
    if isinstance(medium.rows, Levels):
        patches, channels = medium.rows.levels[rows], len(medium.rows.mean)
    else:
        values, channels = medium.rows[rows], 3
        low, high = float(values.min()), float(values.max())
        patches = ((values - low) * (255 / max(high - low, 1e-6))).astype(np.uint8)
    side = round((patches.shape[1] / (channels * _TEMPORAL)) ** 0.5)
    # rows of merge x merge blocks -> [block row, block column, row, column, C, frame, y, x]
    patches = patches.reshape(height // merge, width // merge, merge, merge, channels, _TEMPORAL, side, side)
    pixels = patches[:, :, :, :, :, 0].transpose(0, 2, 5, 1, 3, 6, 4)
    return pixels.reshape(height * side, width * side, channels)


def _jpeg(pixels: np.ndarray) -> str:
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _tag(url: str, medium: Media) -> str:
    meaning = escape(f"{medium.kind}, {medium.tokens} tokens", quote=True)
    return f'<img src="{url}" alt="{meaning}" title="{meaning}">'
