"""The frames of a video file, decoded by PyAV: those asked for, in order, one at a time.

Knows containers, keyframes and timestamps. Knows nothing of which frames are worth having, of patches or of the model.

The file is gone through once without decoding, for the time of every frame and the places of the keyframes. Then it is
decoded from the keyframe before each frame that is wanted; what no other frame refers to is not decoded on the way.
Memory: some tens of frames inside the decoder, however long the video.
"""

from __future__ import annotations

import math
import struct
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from mlx_qwen35.errors import PromptError
from mlx_qwen35.vision.pace import read_pace

if TYPE_CHECKING:
    import av

_WORTH_A_SEEK = 16  # frames: about what a decoder holds back, and has to take in again after a seek


class VideoFile:
    """An open video; a context manager. Raises PromptError when made, and when read, for a file that is no readable
    video, has no frame, or if PyAV is missing.

    count: frames that can be decoded; pace: when they are shown; height, width: as stored, before `display_matrix`.
    """

    def __init__(self, place: Path | BinaryIO, name: str) -> None:
        self._av = _import_av()
        self._place, self._name = place, name
        self._open()
        try:
            self._prepare()
        except BaseException:
            self._container.close()
            raise

    def _open(self) -> None:
        """From the start; for files without times the only way back to it."""
        place = self._place
        try:
            if isinstance(place, Path):
                place = str(place.resolve())
            else:
                place.seek(0)
            # Formats that are lists of other files (playlists) must not reach the network, or anything but files.
            self._container = self._av.open(place, options={"protocol_whitelist": "file"})
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or error  # without a number and the name once more
            raise PromptError(f"{self._name} is no video that can be read ({why}); check the file") from error
        self._stream = self._best_stream()
        self._stream.thread_type = "AUTO"

    def _best_stream(self) -> av.VideoStream:
        """The one that FFmpeg would show. A still picture often goes before an animation, and a cover before sound."""
        streams = self._container.streams
        cover = self._av.stream.Disposition.attached_pic
        covers = [stream for stream in streams.video if stream.disposition & cover]
        best = streams.best("video")
        if best in covers:
            best = next((stream for stream in streams.video if stream not in covers), None)
        if best is not None and best.codec_context is not None:
            return best
        if best is not None:
            self._container.close()
            raise PromptError(f"{self._name} has pictures in a form that FFmpeg has no decoder for; give another file")
        others = [stream.type for stream in streams if stream not in covers]
        kinds = f" ({', '.join(sorted(set(others)))})" if others else ""
        beside = " and a cover" if covers else ""
        self._container.close()
        raise PromptError(
            f"{self._name} has no picture that moves, only {len(others)} other stream"
            f"{'' if len(others) == 1 else 's'}{kinds}{beside}; give a video"
        )

    def _reopen(self) -> None:
        self._container.close()
        self._open()

    def __enter__(self) -> VideoFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._container.close()

    def _prepare(self) -> None:
        self._scan()
        if not self.count:
            raise PromptError(f"{self._name} has no frame")
        stated, tick = self._stream.average_rate or self._stream.guessed_rate, self._stream.time_base
        pace = read_pace([time * tick for time in self._times], stated, tick)
        if pace is None:
            raise PromptError(f"{self._name} does not say how many frames a second it has; give a list of frames")
        self.pace = pace
        self.height, self.width = self._stream.height, self._stream.width

    def _scan(self) -> None:
        """Sets `count`, and, if the file tells the time of every frame, `_times` and `_keys`: the times of the frames
        in order, and of each keyframe the time at which it is shown and that at which it is decoded."""
        times: list[int] = []
        keys: list[tuple[int, int]] = []
        self.count = 0
        for packet in self._packets():
            if packet.is_keyframe and packet.pts is not None:
                keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
            if (keys or packet.pts is None) and not packet.is_discard:  # before the first keyframe nothing decodes
                self.count += 1
                times += [] if packet.pts is None else [packet.pts]
        self._times: list[int] = []
        self._keys = sorted(keys)
        if len(set(times)) == self.count:
            self._times = sorted(time for time in times if time >= self._keys[0][0])
            self.count = len(self._times)

    def _packets(self) -> Iterator[av.Packet]:
        try:
            for packet in self._container.demux(self._stream):
                if packet.size:
                    yield packet
        except self._av.error.FFmpegError as error:
            raise PromptError(f"{self._name} cannot be read to its end ({error}); check the file") from error

    def frames(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        """The frames of these numbers, rising, 0 the first shown. A frame that the file announces and does not have is
        replaced by one beside it."""
        found = self._frames_by_time(indices) if self._times else self._frames_by_number(indices)
        given, last = 0, None
        for last in found:
            yield last
            given += 1
        if last is None:
            raise PromptError(f"{self._name} has no frame that can be decoded; check the file")
        yield from [last] * (len(indices) - given)

    def _frames_by_number(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        wanted = set(indices)
        self._reopen()
        for number, frame in enumerate(self._decode(self._packets())):
            if number in wanted:
                yield frame
            if number >= indices[-1]:
                return

    def _frames_by_time(self, indices: Sequence[int]) -> Iterator[av.VideoFrame]:
        times, keys = self._times, [shown for shown, _ in self._keys]
        wanted = [times[index] for index in indices]
        at = 0  # the next of `wanted`
        while at < len(wanted):
            start = bisect_right(keys, wanted[at]) - 1
            # The run of wanted frames that one go through the file reaches without passing by many others in vain.
            end = at + 1
            while end < len(wanted):
                key = keys[bisect_right(keys, wanted[end]) - 1]
                if bisect_left(times, key) - bisect_left(times, wanted[end - 1]) > _WORTH_A_SEEK:
                    break
                end += 1
            yield from self._run(wanted[at:end], start)
            at = end

    def _run(self, wanted: list[int], start: int) -> Iterator[av.VideoFrame]:
        """The frames of these times, from keyframe number `start` on."""
        at, last = 0, None
        for frame in self._decode(self._packets_from(start), set(wanted)):
            if frame.pts is not None:
                last = frame
            while last is not None and at < len(wanted) and last.pts >= wanted[at]:
                yield last
                at += 1
            if at == len(wanted):
                return
        if last is not None:
            yield from [last] * (len(wanted) - at)

    def _packets_from(self, start: int) -> Iterator[av.Packet]:
        """From keyframe number `start` on. Some formats look for the time shown, some for that of decoding; a seek may
        also come out late. What helps in the end is to begin at the beginning."""
        for time in self._keys[start]:
            try:
                self._container.seek(time, stream=self._stream)
            except (self._av.error.FFmpegError, OSError):
                break
            packets = self._packets()
            key = next((packet for packet in packets if packet.is_keyframe and packet.pts is not None), None)
            if key is not None and key.pts <= self._keys[start][0]:
                return chain([key], packets)
        self._reopen()
        return self._packets()

    def _decode(self, packets: Iterator[av.Packet], wanted: set[int] | None = None) -> Iterator[av.VideoFrame]:
        """With `wanted`, frames of other times may be left out: those that no other frame refers to."""
        decoder: Any = self._stream.codec_context
        try:
            for packet in packets:
                decoder.skip_frame = "DEFAULT" if wanted is None or packet.pts in wanted else "NONREF"
                yield from decoder.decode(packet)
            yield from decoder.decode(None)
        except self._av.error.FFmpegError as error:
            raise PromptError(f"{self._name} is damaged ({error}); encode it again") from error


def display_matrix(frame: av.VideoFrame) -> tuple[float, float, float, float]:
    """(a, b, c, d): a pixel at (x, y) is shown at (a x + c y, b x + d y), but for where the origin is; y grows
    downwards. (1, 0, 0, 1) where the file says nothing (ISO/IEC 14496-12, track header)."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # beside it lies what PyAV has no name for, EXIF for one; of the matrix it tells the turn then
        turn = math.radians(frame.rotation)
        return math.cos(turn), -math.sin(turn), math.sin(turn), math.cos(turn)
    if data is None:
        return 1.0, 0.0, 0.0, 1.0
    values = struct.unpack("=9i", bytes(data))
    return tuple(value / 65536 for value in (values[0], values[1], values[3], values[4]))  # type: ignore[return-value]


def _import_av() -> ModuleType:
    try:
        import av
    except ImportError as error:
        raise PromptError(
            f"a video file needs PyAV ({error}): pip install av, or give a list of frames"
        ) from None
    return av
