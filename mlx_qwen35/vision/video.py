"""A video to patch rows and times: a file, or frames.

Knows which frames are taken, how large they become and when they are shown. Knows nothing of codecs or the
model.

Sampling, sizes and times are those of transformers' Qwen3VL video processor wherever frames come at an even rate.
Differences: frames of an uneven video have the times at which they are shown, and as many are taken as their own mean
rate asks for (transformers: frame i is at i / fps, with the rate that the file states); frames are resized by PIL
(images.py says how far torch is from it), a video that its metadata turn or mirror is set upright as EXIF does it for
pictures, and a single frame is a video too. Frames are resized as they are read, and only a handful exist at full size
at any time.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.vision.animation import AnimatedPicture, is_picture
from mlx_qwen35.vision.images import LARGEST_PIXELS, check_max_pixels, check_ratio, open_image, resize
from mlx_qwen35.vision.media import Media
from mlx_qwen35.vision.pace import Pace
from mlx_qwen35.vision.patches import Patches, read_patches
from mlx_qwen35.vision.reading import VideoFile, display_matrix
from mlx_qwen35.vision.sources import open_source

if TYPE_CHECKING:
    from PIL import Image

_THREADS = min(4, os.cpu_count() or 1)  # each holds one frame at full size
_SKEW = 0.5  # degrees; less is a rounding of the file


@dataclass(frozen=True)
class VideoLimits(Patches):
    """video_preprocessor_config.json, checked. min_pixels and max_pixels are of all frames together, after the resize.
    fps: frames taken a second; min_frames, max_frames: of a video."""

    fps: float
    min_frames: int
    max_frames: int

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, where: str = "video_preprocessor_config.json") -> VideoLimits:
        """Raises CheckpointError naming the key that is missing or wrong. The published files leave out fps, min_frames
        and max_frames; then they are 2, 4 and 768."""
        usual = {"fps": 2, "min_frames": 4, "max_frames": 768}
        sampling = {key: value if config.get(key) is None else config[key] for key, value in usual.items()}
        for key, value in sampling.items():
            kinds = (int, float) if key == "fps" else int
            if not isinstance(value, kinds) or not math.isfinite(value) or value <= 0:
                raise CheckpointError(f"{where}: {key} is {value!r}; it must be above 0: correct or replace it")
        return cls(**read_patches(config, where), **sampling)


def prepare_video(
    source: object,
    limits: VideoLimits,
    *,
    fps: float | None = None,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    source_fps: float | None = None,
    fetch: bool = False,
) -> Media:
    """source: a file (path, bytes, data: URL, open file; an http(s) URL only with `fetch`), a list of frames (each as
    in `images.open_image`, all of one size) or an array [F, H, W, 3].

    fps: frames to take a second, instead of the checkpoint's. max_frames: at most as many, instead of the checkpoint's.
    max_pixels: of one frame once resized, to spend fewer tokens.
    source_fps: the rate of a list or array of frames, which is then sampled as a file is. Without it the frames count
        as sampled already, at `fps`: all are taken, up to max_frames.
    Raises PromptError for what cannot become a video.
    """
    for name, value in (("fps", fps), ("max_frames", max_frames), ("source_fps", source_fps)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise PromptError(f"{name} is {value}; give a number above 0")
    check_max_pixels(max_pixels, limits)
    rate, most = fps or limits.fps, max_frames or limits.max_frames
    with _opened(source, fetch) as video:
        pace = Pace(source_fps) if source_fps and isinstance(video, _Frames) else video.pace
        if pace is None:
            pace, count = Pace(rate), min(video.count, most)
        else:
            count = sample_count(video.count, pace.fps, fps=rate, min_frames=limits.min_frames, max_frames=most)
        indices = sample(video.count, count)
        frames = video.frames(indices)
        rows = _fill(frames, count, limits, max_pixels)
    times = timestamps(indices, pace, limits.temporal_size)
    return Media("video", *limits.flat(rows), timestamps=times, merge_size=limits.merge_size)


def check_video(source: object, *, fetch: bool = False) -> None:
    """Raises PromptError for what cannot be opened as a video; no frame is decoded. Arguments as in prepare_video."""
    with _opened(source, fetch):
        pass


def sample_count(total: int, source_fps: float, *, fps: float, min_frames: int, max_frames: int) -> int:
    """How many of `total` frames are taken."""
    return min(max(int(total / source_fps * fps), min_frames), max_frames, total)


def sample(total: int, count: int) -> list[int]:
    """`count` of the numbers 0..total-1, evenly spread, the first and the last among them."""
    return np.linspace(0, total - 1, count).round().astype(int).tolist()


def timestamps(indices: Sequence[int], pace: Pace, group: int) -> tuple[float, ...]:
    """-> seconds, one for each `group` of frames: the mean of its first and last, the last frame repeated to fill it"""
    padded = [*indices, *[indices[-1]] * (-len(indices) % group)]
    times = [pace.at(index) for index in padded]
    return tuple((times[at] + times[at + group - 1]) / 2 for at in range(0, len(times), group))


def smart_resize_video(
    frames: int, height: int, width: int, *, factor: int, group: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """-> (height, width) of every frame: as `images.smart_resize`, with limits for all frames together.

    group: frames that share a patch. For the limits the number of frames is rounded to whole groups, halves to the even
    number of groups: of 2, 3 and 5 frames count as 4, 7 as 8.
    """
    if min(height, width) < factor:
        scale = max(factor / height, factor / width)
        height, width = int(height * scale), int(width * scale)
    check_ratio(height, width)
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    volume = round(frames / group) * group * high * wide
    if volume > max_pixels:
        shrink = math.sqrt(frames * height * width / max_pixels)
        high = max(factor, math.floor(height / shrink / factor) * factor)
        wide = max(factor, math.floor(width / shrink / factor) * factor)
    elif volume < min_pixels:
        grow = math.sqrt(min_pixels / (frames * height * width))
        high = math.ceil(height * grow / factor) * factor
        wide = math.ceil(width * grow / factor) * factor
    return high, wide


class _Frames:
    """Frames that are there already, or one by one on disk; as a VideoFile without a pace."""

    pace = None

    def __init__(self, frames: Sequence[Any], fetch: bool) -> None:
        self.count = len(frames)
        self._frames = frames
        self._fetch = fetch
        if not self.count:
            raise PromptError("the video has no frame; give at least one")

    def frames(self, indices: Sequence[int]) -> Iterator[Any]:
        for index in indices:
            yield open_image(self._frames[index], fetch=self._fetch)


@contextmanager
def _opened(source: object, fetch: bool) -> Iterator[VideoFile | AnimatedPicture | _Frames]:
    if isinstance(source, (list, tuple)):
        yield _Frames(source, fetch)
    elif hasattr(source, "__array__"):
        array = np.asarray(source)
        if array.ndim != 4:
            raise PromptError(f"an array of {list(array.shape)} is no video; give [F, H, W, 3]")
        yield _Frames(array, fetch)  # type: ignore[arg-type]
    else:
        place, name = open_source(source, "video", fetch=fetch)
        with nullcontext(AnimatedPicture(place, name)) if is_picture(place) else VideoFile(place, name) as video:
            if video.height * video.width > LARGEST_PIXELS:
                raise PromptError(f"{name} has frames of {video.width} x {video.height} pixels; scale it down")
            yield video
        if not isinstance(place, Path) and place is not source:
            place.close()


def _upright(frame: Any) -> Image.Image:
    """A decoded or opened frame -> RGB, mirrored and turned as the file asks for; what a skew one leaves free is black.
    Scales are left out: the resize to come has its own."""
    from PIL import Image

    if isinstance(frame, Image.Image):
        return frame
    image = Image.fromarray(frame.to_ndarray(format="rgb24"))
    a, b, c, d = display_matrix(frame)
    if a * d - b * c < 0:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        a, b = -a, -b
    angle = -math.degrees(math.atan2(b, a)) % 360  # counterclockwise, as Pillow turns
    quarters = round(angle / 90)
    if abs(angle - 90 * quarters) > _SKEW:
        return image.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    turns = (None, Image.Transpose.ROTATE_90, Image.Transpose.ROTATE_180, Image.Transpose.ROTATE_270)
    turn = turns[quarters % 4]
    return image if turn is None else image.transpose(turn)


def _fill(frames: Iterator[Any], count: int, limits: VideoLimits, max_pixels: int | None) -> np.ndarray:
    """Frames [H, W] -> rows as `Patches.empty_rows`; the decoder goes on while threads resize what it gave."""
    first = _upright(next(frames))
    padded = count + -count % limits.temporal_size
    most = min(limits.max_pixels, padded * max_pixels) if max_pixels else limits.max_pixels
    height, width = smart_resize_video(
        max(count, limits.temporal_size),
        first.height,
        first.width,
        factor=limits.factor,
        group=limits.temporal_size,
        min_pixels=min(limits.min_pixels, most),
        max_pixels=most,
    )
    rows = limits.empty_rows(count, height, width)

    def place(number: int, frame: Any) -> None:
        image = _upright(frame)
        if image.size != first.size:
            raise PromptError(f"frame {number} of the video is {image.size}, the first {first.size}; make them equal")
        end = padded if number == count - 1 else number + 1
        limits.write(resize(image, height, width), rows, range(number, end))

    place(0, first)
    pending: deque[Future[None]] = deque()
    last = None
    with ThreadPoolExecutor(_THREADS) as pool:
        for number, frame in enumerate(frames, 1):
            while pending and (len(pending) >= _THREADS or frame is last):  # one frame is never two threads' at a time
                pending.popleft().result()
            last = frame
            pending.append(pool.submit(place, number, frame))
        for future in pending:
            future.result()
    return rows
