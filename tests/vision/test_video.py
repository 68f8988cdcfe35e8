"""Videos from files and frames: sampling, sizes, times and rows against transformers, and which frames a file gives."""

import hashlib
import io
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.vision import reading
from mlx_qwen35.vision.pace import Pace
from mlx_qwen35.vision.video import VideoLimits, prepare_video, sample, sample_count, smart_resize_video, timestamps

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/vision/media.json").read_text())
VALUES = np.array(GOLDEN["values"], dtype=np.float32)
CONFIG = {
    "size": {"longest_edge": 262144, "shortest_edge": 4096},
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "video_processor_type": "Qwen3VLVideoProcessor",
}
LIMITS = VideoLimits.from_config(CONFIG)


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8)


def with_limits(**size: int) -> VideoLimits:
    return VideoLimits.from_config(CONFIG | {"size": size})


def test_sampling_and_times_as_transformers() -> None:
    wrong = []
    for case in GOLDEN["samplings"]:
        fps = case["fps"] or LIMITS.fps
        count = sample_count(case["total"], case["source_fps"], fps=fps, min_frames=4, max_frames=768)
        indices = sample(case["total"], count)
        times = timestamps(indices, Pace(case["source_fps"]), 2)
        both = json.dumps([indices, list(times)]).encode()
        if hashlib.sha256(both).hexdigest()[:32] != case["all"]:
            wrong.append((case, indices[:6], times[-3:]))
    assert not wrong and len(GOLDEN["samplings"]) == 150


def test_sizes_as_transformers() -> None:
    for frames, height, width, size in GOLDEN["video_sizes"]:
        limits = {"factor": 32, "group": 2, "min_pixels": 4096, "max_pixels": 25165824}
        if size is None:
            with pytest.raises(PromptError, match="more than 200 times"):
                smart_resize_video(frames, height, width, **limits)
        else:
            assert smart_resize_video(frames, height, width, **limits) == tuple(size), (frames, height, width)


def test_rows_as_transformers() -> None:
    """Odd numbers of frames, and one, among them; as an array and as a list."""
    for case in GOLDEN["videos"]:
        frames = noise(case["seed"], *case["shape"])
        limits = with_limits(shortest_edge=4096, longest_edge=case["max_pixels"])
        media = prepare_video(frames, limits)
        assert list(media.grid) == case["grid"], case
        levels = np.rint((media.pixels.astype(np.float64) + 1) * 127.5).astype(np.uint8)
        assert np.abs(VALUES[levels] - media.pixels).max() <= 1e-6
        assert hashlib.sha256(levels).hexdigest()[:32] == case["levels"], case
        assert prepare_video([Image.fromarray(frame) for frame in frames], limits).key == media.key


def test_frames_are_sampled_only_with_their_rate(tmp_path: Path) -> None:
    """A list counts as sampled at `fps`; with source_fps it is taken as a file of that rate is."""
    frames = noise(1, 48, 32, 64, 3)
    whole = prepare_video(list(frames), LIMITS)
    assert whole.grid == (24, 2, 4) and whole.tokens == 48
    assert whole.timestamps[:2] == (0.25, 1.25) and whole.timestamps[-1] == 23.25
    assert prepare_video(list(frames), LIMITS, fps=4).timestamps[:2] == (0.125, 0.625)
    sampled = prepare_video(frames, LIMITS, source_fps=24)
    indices = sample(48, 4)
    assert indices == [0, 16, 31, 47] and sampled.timestamps == timestamps(indices, Pace(24), 2)
    assert np.array_equal(sampled.pixels, prepare_video(frames[indices], LIMITS).pixels)
    few = prepare_video(frames, LIMITS, max_frames=6)
    assert few.grid[0] == 3 and few.timestamps == timestamps([0, 9, 19, 28, 38, 47], Pace(2), 2)
    assert prepare_video(frames, LIMITS, source_fps=24, max_frames=3).grid[0] == 2
    paths = []
    for number, frame in enumerate(frames[:5]):
        paths.append(tmp_path / f"{number}.png")
        Image.fromarray(frame).save(paths[-1])
    assert prepare_video(paths, LIMITS).key == prepare_video(frames[:5], LIMITS).key


def test_max_pixels_is_of_a_frame() -> None:
    frames = noise(1, 4, 200, 200, 3)
    assert prepare_video(frames, LIMITS).grid == (2, 12, 12)
    assert prepare_video(frames, LIMITS, max_pixels=4096).grid == (2, 4, 4)


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "no frame"),
        (np.zeros((0, 8, 8, 3), np.uint8), {}, "no frame"),
        (np.zeros((8, 8, 3), np.uint8), {}, r"\[8, 8, 3\] is no video"),
        ([np.zeros((40, 40, 3), np.uint8), np.zeros((40, 44, 3), np.uint8)], {}, "frame 1 of the video"),
        ([np.zeros((40, 40, 3), np.uint8), "nowhere.png"], {}, "no picture at nowhere.png"),
        (np.zeros((4, 3, 33, 8000), np.uint8), {}, "more than 200 times"),
        (np.zeros((4, 40, 40, 3), np.uint8), {"fps": 0}, "fps is 0"),
        (np.zeros((4, 40, 40, 3), np.uint8), {"source_fps": float("nan")}, "source_fps is nan"),
        (np.zeros((4, 40, 40, 3), np.uint8), {"max_frames": -1}, "max_frames is -1"),
        (np.zeros((4, 40, 40, 3), np.uint8), {"max_pixels": 9}, "max_pixels 9"),
        ("nowhere.mp4", {}, "no video at nowhere.mp4"),
        ("concat:a.mp4|b.mp4", {}, "no video at concat"),
        ("https://127.0.0.1:9/a.mp4", {}, "not fetched unless asked for"),
        (3.5, {}, "a video is a path"),
    ],
)
def test_refusals(source: object, options: dict, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        prepare_video(source, LIMITS, **options)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"fps": 0}, "fps is 0"), ({"max_frames": 7.5}, "max_frames is 7.5"), ({"patch_size": "9"}, "patch_size is '9'")],
)
def test_wrong_config(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        VideoLimits.from_config(CONFIG | change)


def test_without_pyav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PromptError, match=r"pip install av"):
        prepare_video(b"whatever", LIMITS)


# Files, where PyAV is installed. Frame i of a clip says its number: 8 squares, black or white, are its binary digits.

SIDE = 16


def numbered(number: int) -> np.ndarray:
    digits = np.array([(number >> bit) & 1 for bit in range(8)], dtype=np.uint8).reshape(2, 4) * 255
    frame = np.repeat(np.repeat(digits, SIDE, axis=0), SIDE, axis=1)
    return np.repeat(frame[..., None], 3, axis=2)


def number_of(image: np.ndarray) -> int:
    squares = image[SIDE // 2 : 32 : SIDE, SIDE // 2 : 64 : SIDE].reshape(8, -1).mean(axis=1)
    assert np.all((squares < 60) | (squares > 195)), squares
    return sum(1 << bit for bit in range(8) if squares[bit] > 128)


@pytest.fixture(scope="module")
def clip() -> Callable[..., bytes]:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra 'video')")

    def make(frames: int, *, codec: str = "libx264", form: str = "mp4", rate: int = 24, **options: str) -> bytes:
        file = io.BytesIO()
        with av.open(file, "w", format=form) as container:
            stream = container.add_stream(codec, rate=rate, options=options)
            stream.width, stream.height = 64, 32
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            for number in range(frames):
                frame = av.VideoFrame.from_ndarray(numbered(number), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        return file.getvalue()

    return make


def numbers(media_pixels: np.ndarray, grid: tuple[int, int, int]) -> list[int]:
    """The numbers shown by the frames of prepared rows."""
    t, h, w = grid
    frames = media_pixels.reshape(t, h // 2, w // 2, 2, 2, 3, 2, 16, 16).transpose(0, 6, 1, 3, 7, 2, 4, 8, 5)
    return [number_of((frame + 1) * 127.5) for frame in frames.reshape(2 * t, h * 16, w * 16, 3)]


FORMS = {
    "h264 with B frames": {"g": "30", "bf": "3"},
    "h264, open groups": {"g": "25", "x264-params": "open-gop=1:bframes=3:scenecut=0"},
    "h264, one keyframe": {"g": "999"},
    "h264, all keyframes": {"g": "1"},
    "h265": {"codec": "libx265", "x265-params": "keyint=40:log-level=none"},
    "mpeg4": {"codec": "mpeg4", "g": "12", "bf": "2", "qmin": "1", "qmax": "3"},
    "vp9 in webm": {"codec": "libvpx-vp9", "form": "webm", "g": "30", "deadline": "realtime", "cpu-used": "8"},
    "h264 in matroska": {"form": "matroska", "g": "30", "bf": "3"},
    "h264 in a transport stream": {"form": "mpegts", "g": "30", "bf": "3"},
    "raw h264": {"form": "h264", "g": "30", "bf": "2"},
    "mjpeg in avi": {"codec": "mjpeg", "form": "avi"},
    "gif": {"codec": "gif", "form": "gif"},
}


@pytest.mark.parametrize("form", FORMS)
def test_the_frames_asked_for(clip: Callable[..., bytes], form: str) -> None:
    """Any numbers, from the first to the last, near and far: those and no others, in every kind of file."""
    if form == "gif":
        data = io.BytesIO()
        pictures = [Image.fromarray(numbered(number)) for number in range(200)]
        pictures[0].save(data, "GIF", save_all=True, append_images=pictures[1:], duration=40)
        data = data.getvalue()
    else:
        data = clip(200, **FORMS[form])
    rng = np.random.RandomState(3)
    with reading.VideoFile(io.BytesIO(data), "the clip") as video:
        assert video.count == 200
        choices = [[0], [199], [0, 199], [5, 6, 7, 190], [28, 29, 30, 31, 59, 60, 61, 120, 121], list(range(200))]
        choices += [sorted(rng.choice(200, 1 + rng.randint(30), replace=False).tolist()) for _ in range(4)]
        for indices in choices:
            shown = [number_of(frame.to_ndarray(format="rgb24")) for frame in video.frames(indices)]
            assert shown == indices


def test_a_file_as_a_video(clip: Callable[..., bytes], tmp_path: Path) -> None:
    """Path, bytes and open file; frames and times as sampled; fps and max_frames as asked for."""
    path = tmp_path / "clip.mp4"
    path.write_bytes(clip(241))
    media = prepare_video(path, LIMITS)
    indices = sample(241, 20)
    assert media.kind == "video" and media.grid == (10, 2, 4)
    assert media.timestamps == timestamps(indices, Pace(24.0), 2)
    assert numbers(media.pixels, media.grid) == indices
    for source in (path.read_bytes(), str(path), io.BytesIO(path.read_bytes())):
        assert prepare_video(source, LIMITS).key == media.key
    quick = prepare_video(path, LIMITS, fps=0.5)
    assert numbers(quick.pixels, quick.grid) == [*sample(241, 5), 240]
    few = prepare_video(path, LIMITS, max_frames=3)
    assert numbers(few.pixels, few.grid) == [0, 120, 240, 240] and few.timestamps == (2.5, 10.0)


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_short_files(clip: Callable[..., bytes], frames: int) -> None:
    media = prepare_video(clip(frames), LIMITS)
    assert media.grid[0] == (frames + 1) // 2 and len(media.timestamps) == media.grid[0]


def test_few_frames_are_decoded(clip: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a video with a keyframe every 10 frames, 4 frames cost at most 4 groups, not the 200 frames."""
    packets = 0
    plain = reading.VideoFile._decode

    def counting(self: reading.VideoFile, source: object, wanted: object = None) -> object:
        def counted() -> object:
            nonlocal packets
            for packet in source:
                packets += 1
                yield packet

        return plain(self, counted(), wanted)

    monkeypatch.setattr(reading.VideoFile, "_decode", counting)
    with reading.VideoFile(io.BytesIO(clip(200, g="10", bf="0", threads="1")), "the clip") as video:
        video._stream.codec_context.thread_count = 1
        assert len(list(video.frames([0, 66, 133, 199]))) == 4
    assert packets <= 40


def test_memory_is_bounded(clip: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    """However many frames are taken, the decoder never runs ahead of the resize by more than the threads hold."""
    from mlx_qwen35.vision import video

    alive, most = set(), 0
    names = itertools.count()
    plain = video._upright

    class Watched:
        def __init__(self, frame: object) -> None:
            self.frame, self.name = frame, next(names)
            alive.add(self.name)

        def __del__(self) -> None:
            alive.discard(self.name)

    frames = reading.VideoFile.frames

    def watched(self: reading.VideoFile, indices: list[int]) -> object:
        nonlocal most
        for frame in frames(self, indices):
            most = max(most, len(alive))
            yield Watched(frame)

    monkeypatch.setattr(reading.VideoFile, "frames", watched)
    monkeypatch.setattr(video, "_upright", lambda w: plain(w.frame if isinstance(w, Watched) else w))
    assert prepare_video(clip(120), LIMITS, fps=24).grid[0] == 60
    assert 0 < most <= 2 * video._THREADS + 2


def test_damaged_files(clip: Callable[..., bytes]) -> None:
    whole = clip(60)
    broken = bytearray(whole)
    broken[800:1600] = bytes(byte ^ 0x5A for byte in broken[800:1600])
    for data, message in [
        (b"", "no video that can be read"),
        (b"no video at all" * 99, r"no video that can be read \(Invalid data found when processing input\); check"),
        (whole[: len(whole) // 2], "no video that can be read"),
        (bytes(broken), "damaged"),
    ]:
        with pytest.raises(PromptError, match=message):
            prepare_video(data, LIMITS)


def test_sound_alone_is_no_video() -> None:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra 'video')")
    file = io.BytesIO()
    with av.open(file, "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(PromptError, match="has no picture"):
        prepare_video(file.getvalue(), LIMITS)
