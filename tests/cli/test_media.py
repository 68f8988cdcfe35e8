"""Pictures and videos on the command line: order, errors before weights, and that a chat sees each of them once."""

import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen35 import conversation, library
from mlx_qwen35.conversation import Conversation
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.library import load
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.vision.media import Media

COUNT = 6


def picture(folder: Path, name: str, *size: int, seed: int = 0) -> Path:
    pixels = np.random.RandomState(seed).randint(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(folder / name)
    return folder / name


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """one.png and other.png: 2 x 3 tokens each; tall.png: 4 x 2 tokens; film.mp4: 4 frames, 2 pairs of 2 x 3 tokens"""
    folder = tmp_path_factory.mktemp("media")
    picture(folder, "one.png", 24, 16, seed=1)
    picture(folder, "other.png", 24, 16, seed=2)
    picture(folder, "tall.png", 16, 32, seed=3)
    picture(folder, "my 'own' one.png", 24, 16, seed=4)
    return folder


@pytest.fixture(scope="module")
def film(media) -> Path:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra 'video')")
    frames = np.random.RandomState(4).randint(0, 256, (4, 16, 24, 3), np.uint8)
    with av.open(str(media / "film.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return media / "film.mp4"


def ask(run, model: Path, *flags) -> dict:
    done = run("generate", "--model", model, "-p", "what is it", "--no-think", "-n", COUNT, "--json", *flags)
    assert (done.status, done.err) == (0, "")
    return json.loads(done.out)


def test_pictures_and_videos_come_in_the_order_of_the_flags(seeing, run, media, film, encoded):
    flags = ["--image", media / "tall.png", "--video", film, "--image", media / "one.png"]
    found = ask(run, seeing, *flags)
    assert sorted(encoded) == [(1, 4, 6), (1, 8, 4), (2, 4, 6)]
    model, processor = load(seeing)
    parts = [{"type": "image", "image": media / "tall.png"}, {"type": "video", "video": film}]
    parts += [{"type": "image", "image": media / "one.png"}, {"type": "text", "text": "what is it"}]
    prompt = processor.prompt([{"role": "user", "content": parts}], enable_thinking=False)
    assert [medium.kind for medium in prompt.media] == ["image", "video", "image"]
    said = stream_generate(model, processor, prompt, max_tokens=COUNT, sampling=Sampling())
    assert found["text"] == "".join(part.text for part in said)
    assert found["statistics"]["prompt_tokens"] == len(prompt.tokens)
    text = ask(run, seeing)["statistics"]["prompt_tokens"]
    frames = len(processor.encode("<0.2 seconds>")) * 2 + 2 * (2 + 6)
    assert len(prompt.tokens) == text + (2 + 8) + frames + (2 + 6)


def test_another_picture_is_another_answer(seeing, run, media):
    answers = [ask(run, seeing, "--image", media / name)["text"] for name in ("one.png", "other.png", "one.png")]
    assert answers[0] == answers[2] != answers[1]


def test_fps_and_max_pixels_make_them_smaller(seeing, run, media, film, encoded):
    ask(run, seeing, "--image", media / "tall.png", "--max-pixels", 128)
    ask(run, seeing, "--video", film, "--fps", 0.5)
    assert encoded == [(1, 4, 2), (2, 4, 6)]  # never less than four frames
    ask(run, seeing, "--video", film, "--max-pixels", 64)
    assert encoded[2:] == [(2, 2, 2)]


def test_a_prompt_may_be_empty_where_something_is_shown_but_not_left_out(seeing, run, media):
    done = run("generate", "--model", seeing, "-p", "", "-n", 1, "--image", media / "one.png")
    assert done.status == 0
    assert done.err.startswith("The answer is cut after 1 tokens (-n). -n 2 gives it more room.\nIt was still reason")
    done = run("generate", "--image", media / "one.png")
    assert done.status == 2 and done.err.startswith("error: no prompt") and done.err.count("\n") == 1


def png_head(width: int, height: int) -> bytes:
    """A picture that says it is so large, and holds nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def without_frames() -> bytes:
    av = pytest.importorskip("av", reason="PyAV is not installed (extra 'video')")
    file = io.BytesIO()
    with av.open(file, "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "yuv420p"
        container.start_encoding()
    return file.getvalue()


def png(width: int, height: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, "png")
    return file.getvalue()


WRONG = {
    "no file": ("--image", None, "no picture at"),
    "no picture": ("--image", lambda: b"not a picture", "no picture that can be read"),
    "half a picture": ("--image", lambda: png(64, 64)[:60], "check the file"),
    "bomb": ("--image", lambda: png_head(50_000, 50_000), "scale it down"),
    "too long": ("--image", lambda: png(402, 2), "crop it"),
    "no video": ("--video", None, "no video at"),
    "no frame": ("--video", without_frames, "has no frame"),
    "not a video": ("--video", lambda: b"not a video", "no video that can be read"),
    "sight of none": ("--image", lambda: png(24, 16), "no vision tower"),
    "network": ("--image", "https://127.0.0.1:9/one.png", "is not fetched unless asked for"),
    "network, video": ("--video", "http://127.0.0.1:9/film.mp4", "is not fetched unless asked for"),
    "network, in vain": ("--fetch", "http://127.0.0.1:9/one.png", "could not be fetched"),
}


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_shown_is_one_line_before_weights_are_read(
    seeing, checkpoint, run, tmp_path, monkeypatch, case, command
):
    flag, content, says = WRONG[case]
    source = content if isinstance(content, str) else tmp_path / "file"
    if callable(content):
        source.write_bytes(content())
    monkeypatch.setattr(library, "load_held", lambda *a, **k: pytest.fail("weights are read"))
    flags = ["--fetch", "--image", source] if flag == "--fetch" else [flag, source]
    argv = [command, "--model", checkpoint if case == "sight of none" else seeing, *flags]
    done = run(*argv, *(["-p", "what is it"] if command == "generate" else []), stdin="what is it\n")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err


@pytest.mark.parametrize(
    "flags, says",
    [
        (["--fps", "0"], "fps is 0"),
        (["--fps", "nan"], "fps is nan"),
        (["--max-pixels", "3"], "max_pixels 3 is less than one token"),
        (["--context-length", "10"], "max_pixels= or fps= makes them fewer"),
    ],
)
def test_flags_that_make_no_sense(seeing, run, film, monkeypatch, flags, says):
    monkeypatch.setattr(library, "load_held", lambda *a, **k: pytest.fail("weights are read"))
    done = run("generate", "--model", seeing, "-p", "hi", "--video", film, *flags)
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err


@pytest.fixture(scope="module")
def loaded(seeing):
    return load(seeing)


@pytest.fixture
def talk(loaded) -> Conversation:
    model, processor = loaded
    settings = {"max_tokens": COUNT, "sampling": Sampling(), "stop": [], "on_progress": None, "chunk_size": 5}
    return Conversation(model, processor, system=None, tools=[], enable_thinking=False, reading={}, settings=settings)


def show(talk: Conversation, file: str) -> Media:
    part = talk.read("image", file, "/image")
    talk.shown.append(part)
    return part["image"]


def answered(talk: Conversation, line: str) -> str:
    """The answer to a line, which has to be the one that comes without anything that was kept."""
    model, processor = talk._model, talk._processor
    content = [*talk.shown, {"type": "text", "text": line}]
    whole = processor.prompt([*talk.messages, {"role": "user", "content": content}], enable_thinking=False)
    wanted = "".join(part.text for part in stream_generate(model, processor, whole, **talk._settings))
    talk.answer([talk.question(line)], lambda part: None)
    assert talk.messages[-1]["role"] == "assistant" and talk.shown == []
    assert talk.messages[-1]["content"] == wanted.strip()
    return wanted


def test_a_picture_is_encoded_once_whichever_turn_asks(talk, media, encoded):
    def encodings(line: str) -> int:
        answered(talk, line)
        count, encoded[:] = len(encoded), []
        return count - len(shown)  # the answer without anything kept encodes them all

    shown = [show(talk, str(media / "one.png"))]
    assert encodings("what is it") == 1
    assert encodings("and now") == 0
    shown.append(show(talk, str(media / "tall.png")))
    assert encodings("and this") == 1
    shown.append(show(talk, str(media / "one.png")))  # read again
    assert encodings("once more") == 0
    talk.reset()
    shown = [show(talk, str(media / "tall.png"))]
    assert encodings("after a reset") == 0


def test_equal_sizes_swapped_between_chats_are_two_answers(talk, media):
    answers = []
    for name in ("one.png", "other.png", "one.png", "other.png"):
        talk.reset()
        show(talk, str(media / name))
        answers.append((answered(talk, "what is it"), answered(talk, "and again")))
    assert answers[0] == answers[2] != answers[1] == answers[3]
    assert answers[0][0] != answers[1][0]


def test_a_message_given_up_inside_a_picture_is_asked_again(talk, media, encoded, monkeypatch):
    whole = talk._processor.prompt
    settings, total = talk._settings, len(whole([{"role": "user", "content": "what is it"}]).tokens) + 8
    for stop in range(5, total, 5):
        talk.reset()
        shown = show(talk, str(media / "one.png"))

        class Pressed:
            done = 0

            def is_set(self, stop=stop):
                return self.done >= stop

        pressed = Pressed()
        with monkeypatch.context() as patch:
            patch.setattr(conversation, "stop_on_ctrl_c", lambda pressed=pressed: _as_context(pressed))
            talk._settings = settings | {"on_progress": lambda done, total, p=pressed: setattr(p, "done", done)}
            *_, last = talk.answer([talk.question("what is it")], lambda part: None)
        talk._settings = settings
        assert last.finish_reason == "cancelled" and talk.messages == []
        assert [part["image"] for part in talk.shown] == [shown] and talk._session.cache.offset >= stop
        encoded.clear()
        answered(talk, "what is it")
        assert len(encoded) == 1  # for the answer without anything kept


class _as_context:
    def __init__(self, value):
        self.value = value

    def __enter__(self):
        return self.value

    def __exit__(self, *error):
        pass


def test_commands_and_flags_of_a_chat(seeing, run, media, film, encoded):
    lines = ["what is it", "/image", f"/image  {media / 'one.png'} ", f"/video {film}", "and these", "/image no.png"]
    done = run("chat", "--model", seeing, "--no-think", "-n", 2, "--image", media / "tall.png", stdin="\n".join(lines))
    assert done.status == 0 and sorted(encoded) == [(1, 4, 6), (1, 8, 4), (2, 4, 6)]
    lines = done.err.splitlines()
    errors = [line for line in lines if not line.startswith("The answer is cut after 2 tokens (-n). /regen 4 ")]
    assert len(lines) == len(errors) + 2
    assert errors[0] == "error: no file; write /image FILE"
    assert errors[1:3] == [f"The next message shows this {kind} tokens)." for kind in ("image (6", "video (12")]
    assert "no picture at no.png" in errors[3] and len(errors) == 4


def test_a_file_dropped_on_the_terminal(seeing, run, media, encoded):
    plain = str(media / "my 'own' one.png")
    quoted = "'" + plain.replace("'", "'\\''") + "'"
    escaped = plain.replace(" ", "\\ ").replace("'", "\\'")
    for file in (plain, quoted, escaped):
        done = run("chat", "--model", seeing, "--no-think", "-n", 1, stdin=f"/image {file}\nhi\n")
        assert "error" not in done.err
    assert encoded == [(1, 4, 6)] * 3


def test_what_is_too_large_does_not_stay_in_the_way(seeing, run, media, encoded):
    lines = [f"/image {media / 'one.png'}", "hello " * 60, "hello"]
    done = run("chat", "--model", seeing, "--no-think", "-n", 2, "--context-length", 80, stdin="\n".join(lines))
    assert done.status == 0
    assert [line.partition(" ")[0] for line in done.err.splitlines()] == ["The", "error:", "What", "The"]
    assert encoded == []


def test_a_text_checkpoint_goes_on_after_a_picture(speak, run, media):
    speak("hello")
    done = run("chat", "--model", "x", "--no-think", stdin=f"/image {media / 'one.png'}\none\n")
    assert (done.status, done.out) == (0, "hello\n")
    assert "no vision tower" in done.err and done.err.count("\n") == 1
