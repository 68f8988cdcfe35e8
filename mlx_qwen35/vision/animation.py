"""An animated picture as a video: frames and times of what Pillow reads and FFmpeg does not.

Knows which files those are. Knows nothing of which frames are worth having.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from mlx_qwen35.errors import PromptError
from mlx_qwen35.vision.images import file_kind, open_picture, rgb, upright
from mlx_qwen35.vision.pace import Pace, read_pace

if TYPE_CHECKING:
    from PIL import Image

_MILLISECOND = Fraction(1, 1000)


def is_picture(place: Path | BinaryIO) -> bool:
    """Whether a file is one that FFmpeg cannot read, or of which it finds a tile for the whole: WebP, HEIC and HEIF."""
    return file_kind(place) is not None


class AnimatedPicture:
    """An open animation, read as a VideoFile is. Raises PromptError when made, and when read, for what is damaged.

    count: frames; pace: when they are shown; height, width: of each.
    """

    def __init__(self, place: Path | BinaryIO, name: str) -> None:
        self._image, self._name = open_picture(place, name), name
        self.width, self.height = self._image.size
        self.count = getattr(self._image, "n_frames", 1)
        ends = [Fraction(0)]
        for number in range(self.count - 1):  # Pillow tells how long a frame is shown once it is decoded
            self._seek(number)
            ends.append(ends[-1] + Fraction(self._image.info.get("duration") or 0) / 1000)
        even = any(end <= start for start, end in zip(ends, ends[1:], strict=False))  # some state no duration at all
        self.pace = Pace(10.0) if even else read_pace(ends, None, _MILLISECOND) or Pace(1.0)

    def frames(self, indices: Sequence[int]) -> Iterator[Image.Image]:
        """The frames of these numbers, rising, with transparency over white."""
        for index in indices:
            self._seek(index)
            yield rgb(upright(self._image.copy()))

    def _seek(self, number: int) -> None:
        try:
            self._image.seek(number)
            self._image.load()
        except Exception as error:  # readers raise anything on damaged data
            raise PromptError(f"{self._name}: frame {number} cannot be read ({error}); encode it again") from error
