"""Forty made files, whose frames say themselves when they are shown and which way is up.

Each frame draws its number as eight squares at the top, and a square at the bottom left. What prepare_video gives has
to show both where they were drawn, and to date every frame pair by the times that the file was made with.
"""

import io
import itertools
import struct
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np
import pytest
from PIL import Image

from mlx_qwen35.errors import PromptError
from mlx_qwen35.vision import video
from mlx_qwen35.vision.images import ImageLimits, prepare_image
from mlx_qwen35.vision.pace import read_pace
from mlx_qwen35.vision.video import VideoLimits, prepare_video

av = pytest.importorskip("av", reason="PyAV is not installed (extra 'video')")

CONFIG = {
    "size": {"longest_edge": 10**8, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
}
LIMITS = VideoLimits.from_config(CONFIG)
SIDE = 16
WIDE, HIGH = 64, 96
ALL = 10_000.0  # frames a second: more than there are, so all are taken

FLAT = (1, 0, 0, 1)
MATRICES = list(itertools.product((1, -1), (0,), (0,), (1, -1))) + list(itertools.product((0,), (1, -1), (1, -1), (0,)))


def drawn(number: int) -> np.ndarray:
    """-> [96, 64, 3] levels"""
    frame = np.zeros((HIGH, WIDE), np.uint8)
    for bit in range(8):
        top, left = bit // 4 * SIDE, bit % 4 * SIDE
        frame[top : top + SIDE, left : left + SIDE] = (number >> bit & 1) * 255
    frame[-2 * SIDE :, : WIDE // 2] = 255
    return np.repeat(frame[..., None], 3, axis=2)


def number_of(frame: np.ndarray) -> int:
    """The number, of a frame that is upright."""
    assert frame.shape[:2] == (HIGH, WIDE)
    assert frame[-SIDE:, :SIDE].mean() > 195 and frame[-SIDE:, -SIDE:].mean() < 60, "not upright"
    centres = frame[SIDE // 2 : 2 * SIDE : SIDE, SIDE // 2 :: SIDE].reshape(8, -1).mean(axis=1)
    assert np.all((centres < 60) | (centres > 195)), centres
    return sum(1 << bit for bit in range(8) if centres[bit] > 128)


def numbers_of(media: Any) -> list[int]:
    t, h, w = media.grid
    frames = media.pixels.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 16, 16).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return [number_of((frame + 1) * 127.5) for frame in frames.reshape(2 * t, h * 16, w * 16, 3)]


def stored(frame: np.ndarray, matrix: Sequence[int]) -> np.ndarray:
    """What has to be stored, so that a player that obeys the matrix shows `frame`."""
    a, b, c, d = matrix
    high, wide = frame.shape[:2]
    shape = (high, wide) if a else (wide, high)
    y, x = np.mgrid[: shape[0], : shape[1]]
    shown_x, shown_y = a * x + c * y, b * x + d * y
    return frame[shown_y - shown_y.min(), shown_x - shown_x.min()]


def with_matrix(data: bytes, matrix: Sequence[float]) -> bytes:
    """An mp4 or mov file whose track header says so (ISO/IEC 14496-12, 8.3.2: 40 bytes after the type in version 0)."""
    a, b, c, d = (round(value * 65536) for value in matrix)
    at = data.index(b"tkhd") + 44
    return data[:at] + struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30) + data[at + 36 :]


def film(times: Sequence[float], *, form: str = "mp4", codec: str = "libx264", rate: Any = 30, tick: int = 90_000,
         matrix: Sequence[int] = FLAT, beside: str = "") -> bytes:  # fmt: skip
    """A file of frames that are shown at these seconds. beside: what else it holds, before or after."""
    file = io.BytesIO()
    with av.open(file, "w", format=form) as out:
        first = {"sound first": _sound, "cover first": _cover}.get(beside)
        fill = first(out) if first else None
        video = out.add_stream(codec, rate=rate)
        high, wide = stored(drawn(0), matrix).shape[:2]
        video.width, video.height = wide, high
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.codec_context.time_base = Fraction(1, tick)
        if codec == "libx264":
            video.options = {"g": "30", "bf": "2"}
        if beside == "cover last":
            fill = _cover(out)
        if fill:
            fill()
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(stored(drawn(number), matrix), format="rgb24")
            frame.pts, frame.time_base = round(time * tick), Fraction(1, tick)
            out.mux(video.encode(frame))
        out.mux(video.encode())
    return file.getvalue() if matrix == FLAT else with_matrix(file.getvalue(), matrix)


def _sound(out: Any) -> Callable[[], None]:
    """Adds a stream; what it returns fills it, once all streams are there."""
    sound = out.add_stream("aac", rate=16000)

    def fill() -> None:
        for number in range(4):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.rate, frame.pts = 16000, number * 1024
            out.mux(sound.encode(frame))
        out.mux(sound.encode())

    return fill


def _cover(out: Any) -> Callable[[], None]:
    cover = out.add_stream("mjpeg", rate=1)
    cover.width, cover.height, cover.pix_fmt = 32, 32, "yuvj420p"
    try:
        cover.disposition = av.stream.Disposition.attached_pic
    except TypeError:
        pytest.skip(f"PyAV {av.__version__} cannot write what a stream is for")

    def fill() -> None:
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 90, np.uint8), format="rgb24")
        frame.pts = 0
        out.mux(cover.encode(frame))
        out.mux(cover.encode())

    return fill


def animation(times: Sequence[float], form: str) -> bytes:
    file = io.BytesIO()
    pictures = [Image.fromarray(drawn(number)) for number in range(len(times))]
    durations = [round(1000 * (end - start)) for start, end in itertools.pairwise(times)] + [100]
    pictures[0].save(file, form, save_all=True, append_images=pictures[1:], duration=durations)
    return file.getvalue()


def even(count: int, rate: float) -> list[float]:
    return [number / rate for number in range(count)]


BURST = [*even(8, 1), *[8 + n / 30 for n in range(20)], 12.0, 15.5]  # a recording of a screen
GAPS = [n / 30 for n in range(60) if n % 7 not in (2, 3)]  # frames are left out
SLOWING = [0.02 * n * n for n in range(20)]
NTSC = Fraction(30000, 1001)

FILMS: dict[str, Any] = {
    **{f"mp4 at {r}": lambda r=r: (film(even(48, r), rate=r), even(48, r)) for r in (1, 10, 24, 60)},
    "mp4 at 29.97": lambda: (film(even(48, NTSC), rate=NTSC), even(48, NTSC)),
    "mov at 25": lambda: (film(even(30, 25), form="mov", rate=25), even(30, 25)),
    "matroska at 24": lambda: (film(even(48, 24), form="matroska", rate=24, tick=1000), even(48, 24)),
    "webm at 30": lambda: (film(even(30, 30), form="webm", codec="libvpx-vp9", tick=1000), even(30, 30)),
    "avi at 15": lambda: (film(even(30, 15), form="avi", codec="mjpeg", rate=15, tick=15), even(30, 15)),
    "transport stream at 30": lambda: (film(even(60, 30), form="mpegts"), even(60, 30)),
    "transport stream at 50": lambda: (film(even(60, 50), form="mpegts", rate=50), even(60, 50)),
    **{
        f"{name} in {form}": lambda times=times, form=form: (film(times, form=form, tick=tick_of(form)), times)
        for name, times in (("burst", BURST), ("gaps", GAPS), ("slowing", SLOWING))
        for form in ("mp4", "matroska", "mov", "mpegts")
    },
    "burst in webm": lambda: (film(BURST, form="webm", codec="libvpx-vp9", tick=1000), BURST),
    "two frames, a minute apart": lambda: (film([0, 60]), [0, 60]),
    "one frame": lambda: (film([0]), [0]),
    **{
        f"matrix {matrix}": lambda matrix=matrix: (film(even(6, 30), form="mov", matrix=matrix), even(6, 30))
        for matrix in MATRICES
    },
    "sound first": lambda: (film(BURST, beside="sound first"), BURST),
    "cover first": lambda: (film(GAPS, beside="cover first"), GAPS),
    "cover last": lambda: (film(GAPS, beside="cover last"), GAPS),
    "gif": lambda: (animation([0, 0.1, 0.5, 0.6, 2.0], "GIF"), [0, 0.1, 0.5, 0.6, 2.0]),
    "animated png": lambda: (animation([0, 0.1, 0.5, 0.6, 2.0], "PNG"), [0, 0.1, 0.5, 0.6, 2.0]),
    "animated webp": lambda: (animation([0, 0.1, 0.5, 0.6, 2.0], "WEBP"), [0, 0.1, 0.5, 0.6, 2.0]),
    "animated webp, even": lambda: (animation(even(20, 10), "WEBP"), even(20, 10)),
    "animated avif": lambda: (animation([0, 1, 2, 3, 8, 9], "AVIF"), [0, 1, 2, 3, 8, 9]),
}


def tick_of(form: str) -> int:
    return 1000 if form == "matroska" else 90_000


def test_there_are_forty() -> None:
    assert len(FILMS) >= 40


@pytest.mark.parametrize("name", FILMS)
def test_time_and_orientation(name: str) -> None:
    if name == "animated avif" and ".avif" not in Image.registered_extensions():
        pytest.skip("this Pillow has no AVIF")
    data, times = FILMS[name]()
    media = prepare_video(data, LIMITS, fps=ALL)
    count = len(times)
    padded = [*range(count), *[count - 1] * (count % 2)]
    assert numbers_of(media) == padded
    want = [(times[a] + times[b]) / 2 for a, b in zip(padded[::2], padded[1::2], strict=True)]
    assert np.abs(np.array(media.timestamps) - want).max() <= 0.0011  # Matroska counts in milliseconds
    sampled = prepare_video(data, LIMITS)  # two a second: of the mean rate of the frames' own times
    if count > 1:
        mean = (count - 1) / (times[-1] - times[0])
        wanted = min(max(int(count / mean * 2 + 1e-3), LIMITS.min_frames), count)
        assert abs(len(set(numbers_of(sampled))) - wanted) <= (name.startswith("burst") or name == "sound first")


def test_a_skew_matrix_turns_the_frame() -> None:
    """By 45 degrees: the corners are black, and the middle is what was in the middle."""
    frame = Image.fromarray(drawn(255))
    half = 2**-0.5
    data = with_matrix(film(even(4, 10), form="mov"), (half, half, -half, half))
    media = prepare_video(data, LIMITS, fps=ALL)
    turned = frame.rotate(-45, expand=True)
    ratio = media.grid[1] / media.grid[2]
    assert abs(ratio - turned.height / turned.width) < 0.2


def test_the_longest_of_one_frame() -> None:
    """A single frame fills a pair: the limit of pixels counts two."""
    limits = VideoLimits.from_config(CONFIG | {"size": {"longest_edge": 2 * 64 * 64, "shortest_edge": 4096}})
    frame = np.zeros((1, 256, 256, 3), np.uint8)
    assert prepare_video(frame, limits).grid == (1, 4, 4)


@pytest.mark.parametrize(("kinds", "message"), [("sound", r"only 1 other stream \(audio\)"), ("cover", "and a cover")])
def test_sound_without_picture(kinds: str, message: str) -> None:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as out:
        fills = [_sound(out), *([_cover(out)] if kinds == "cover" else [])]
        for fill in fills:
            fill()
    with pytest.raises(PromptError, match=message):
        prepare_video(file.getvalue(), LIMITS)


def test_a_broken_animation_is_named() -> None:
    data = animation(even(20, 10), "WEBP")
    with pytest.raises(PromptError, match=r"cannot be read|no picture"):
        prepare_video(data[: len(data) // 2], LIMITS)


def heif(picture: Image.Image) -> bytes:
    pillow_heif = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed (extra 'photos')")
    pillow_heif.register_heif_opener()
    file = io.BytesIO()
    picture.save(file, "HEIF", quality=95)
    return file.getvalue()


def test_heic_is_a_picture() -> None:
    """As a phone writes it; also where it is given as a video, of which FFmpeg would see one tile."""
    data = heif(Image.fromarray(drawn(77)))
    limits = ImageLimits.from_config(CONFIG)
    media = prepare_image(data, limits)
    assert media.grid == (1, HIGH // 16, WIDE // 16)
    assert set(numbers_of(media)) == {77}
    still = prepare_video(data, LIMITS)
    assert still.grid[0] == 1 and set(numbers_of(still)) == {77}


def test_heic_without_its_reader_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    data = heif(Image.fromarray(drawn(1)))
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)
    with pytest.raises(PromptError, match="pip install pillow-heif"):
        prepare_image(data, ImageLimits.from_config(CONFIG))


def test_pace_of_times() -> None:
    tick = Fraction(1, 1000)
    rounded = [Fraction(round(1000 * n / 24), 1000) for n in range(240)]
    assert read_pace(rounded, Fraction(600), tick).fps == 24.0  # what is stated is wrong; what is kept counts
    assert read_pace(rounded, Fraction(600), tick).times is None
    assert read_pace([], Fraction(25), tick).fps == 25.0
    assert read_pace([], None, tick) is None
    assert read_pace([Fraction(5)], None, tick).fps == 1.0
    uneven = read_pace([Fraction(3), Fraction(4), Fraction(9)], Fraction(30), tick)
    assert uneven.times == (0.0, 1.0, 6.0) and uneven.fps == pytest.approx(1 / 3)


@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_exif_beside_the_matrix_of_a_frame(turn: int) -> None:
    """PyAV 18.1 has no name for EXIF among a frame's data, and refuses all of them."""
    exif = Image.Exif()
    exif[0x0112] = turn
    lying = {1: None, 3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}[turn]
    picture = Image.fromarray(drawn(77))
    file = io.BytesIO()
    (picture if lying is None else picture.transpose(lying)).save(file, "PNG", exif=exif)
    assert set(numbers_of(prepare_video(file.getvalue(), LIMITS))) == {77}


def test_a_form_without_a_decoder_is_said() -> None:
    with pytest.raises(PromptError, match="no decoder"):
        prepare_video(b"<svg xmlns='http://www.w3.org/2000/svg' width='10' height='10'/>", LIMITS)


def test_a_frame_that_stands_for_others_is_read_by_one_thread_at_a_time() -> None:
    """A damaged file gives one frame several times; two threads that convert one end the process."""

    class Frame:
        side_data: ClassVar[dict[str, bytes]] = {}
        busy = 0

        def to_ndarray(self, format: str) -> np.ndarray:
            self.busy += 1
            time.sleep(0.01)
            assert self.busy == 1
            self.busy -= 1
            return drawn(5)

    frame, other = Frame(), Frame()
    rows = video._fill(iter([frame, frame, frame, frame, other, other, other]), 7, LIMITS, None)
    assert rows.any()
