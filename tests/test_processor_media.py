"""Pictures and videos of a prompt: where they go, in whatever form they come, and what is refused before any work."""

import base64
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlx_qwen35.checkpoint.load import read_config
from mlx_qwen35.errors import CheckpointError, PromptError
from mlx_qwen35.library import demo_folder
from mlx_qwen35.processor import Processor
from mlx_qwen35.vision import Media

PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(demo_folder(), read_config(demo_folder()))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    """64 x 96 pixels: 2 x 3 tokens."""
    return Image.fromarray(np.random.RandomState(0).randint(0, 255, (64, 96, 3), np.uint8))


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Three frames of 64 x 64 pixels: 2 pairs of 2 x 2 tokens."""
    return np.random.RandomState(1).randint(0, 255, (3, 64, 64, 3), np.uint8)


@pytest.fixture(scope="module")
def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def user(*content):
    return {"role": "user", "content": list(content)}


def text(words):
    return {"type": "text", "text": words}


def shown(tokens: int) -> str:
    return f"<|vision_start|>{PAD * tokens}<|vision_end|>"


def filmed(*seconds: float, tokens: int) -> str:
    pads = f"<|vision_start|>{VIDEO_PAD * tokens}<|vision_end|>"
    return "".join(f"<{second:.1f} seconds>{pads}" for second in seconds)


def test_an_image_goes_before_the_question(processor, picture):
    prompt = processor.prompt("What is it?", images=[picture])
    assert f"user\n{shown(6)}What is it?<|im_end|>" in prompt.text
    assert prompt.tokens.count(processor.config.image_token_id) == 6
    assert [(m.kind, m.grid) for m in prompt.media] == [("image", (1, 4, 6))]
    assert processor.prompt("What is it?").media == ()


def test_images_and_videos_in_any_order(processor, picture, frames):
    image, video = {"type": "image", "image": picture}, {"type": "video", "video": frames}
    small = {"type": "image", "image": picture.crop((0, 0, 64, 64))}
    prompt = processor.prompt(
        [user(video, text("a"), image, text("b")), {"role": "assistant", "content": "x"}, user(small, video, text("c"))]
    )
    film = filmed(0.25, 1.0, tokens=4)
    assert f"user\n{film}a{shown(6)}b<" in prompt.text and f"user\n{shown(4)}{film}c<" in prompt.text
    assert [(m.kind, m.grid) for m in prompt.media] == [
        ("video", (2, 4, 4)), ("image", (1, 4, 6)), ("image", (1, 4, 4)), ("video", (2, 4, 4))]  # fmt: skip
    assert prompt.tokens.count(processor.config.video_token_id) == 16
    both = processor.prompt("d", images=[picture], videos=[frames])
    assert f"user\n{shown(6)}{film}d<" in both.text


def test_every_form_of_a_source(processor, picture, png, tmp_path):
    path = tmp_path / "a picture.png"
    path.write_bytes(png)
    coded = base64.b64encode(png).decode()
    url = f"data:image/png;base64,{coded}"
    expected = processor.prompt("?", images=[picture])
    parts = [
        {"type": "image", "image": str(path)},
        {"type": "image", "image": path},
        {"type": "image", "image": png},
        {"type": "image", "path": str(path)},
        {"type": "image", "url": path.as_uri()},
        {"type": "image", "url": url},
        {"type": "image", "base64": coded},
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": str(path)},
        {"type": "input_image", "image_url": url},
        {"image": np.asarray(picture)},
        {"type": "image", "image": expected.media[0]},
    ]
    for part in parts:
        prompt = processor.prompt([user(part, text("?"))])
        assert prompt.tokens == expected.tokens
        assert prompt.media[0].key == expected.media[0].key


def test_parts_without_a_source_are_filled_in_order(processor, picture):
    small = picture.crop((0, 0, 64, 64))
    messages = [user({"type": "image"}, text("a")), user(text("b"), {"type": "image"})]
    before = json.dumps(messages)
    prompt = processor.prompt(messages, images=[small, picture])
    assert [m.grid for m in prompt.media] == [(1, 4, 4), (1, 4, 6)]
    assert json.dumps(messages) == before
    for images in ([], [small], [small] * 3):
        with pytest.raises(PromptError, match=f"2 image parts .* images= holds {len(images)}"):
            processor.prompt(messages, images=images)


def test_a_system_message_stays_before_the_image(processor, picture):
    prompt = processor.prompt("?", system="Be brief.", images=[picture])
    assert prompt.text.startswith(f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{shown(6)}?")


def test_ids_with_placeholders(processor, picture, frames):
    made = processor.prompt("?", images=[picture], videos=[frames])
    again = processor.prompt(made.tokens, images=[picture], videos=[frames])
    assert again.tokens == made.tokens and [m.key for m in again.media] == [m.key for m in made.media]
    with pytest.raises(PromptError, match="placeholders"):
        processor.prompt(made.tokens, images=[picture])
    with pytest.raises(PromptError, match="placeholders"):
        processor.prompt(made.tokens[:-40], images=[picture, picture], videos=[frames])


def test_fewer_pixels_and_frames(processor, picture, tmp_path):
    assert processor.prompt("?", images=[picture], max_pixels=32 * 96).media[0].tokens == 2
    assert processor.prompt([user({"type": "image", "image": picture, "max_pixels": 1024})]).media[0].tokens == 1
    large = np.zeros((8, 128, 128, 3), np.uint8)
    assert processor.prompt("?", videos=[large], fps=4).media[0].timestamps == (0.125, 0.625, 1.125, 1.625)
    assert processor.prompt([user({"type": "video", "video": large, "fps": 1})]).media[0].timestamps[-1] == 6.5
    assert processor.prompt("?", videos=[large], max_pixels=32 * 32).media[0].tokens == 4


def test_prepared_messages_are_not_read_again(processor, picture, png, frames, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png)
    messages = [user({"type": "image_url", "image_url": str(path)}, {"type": "video", "video": frames}, text("?"))]
    expected = processor.prompt(messages)
    prepared = processor.prepare(messages)
    path.unlink()
    prompt = processor.prompt(prepared)
    assert prompt.tokens == expected.tokens and [m.key for m in prompt.media] == [m.key for m in expected.media]
    assert isinstance(prepared[0]["content"][0]["image"], Media)
    with pytest.raises(PromptError, match="no picture at"):
        processor.prompt(messages)
    with pytest.raises(PromptError, match="has no source"):
        processor.prepare([user({"type": "image"})])


def test_what_cannot_be_seen(processor, picture, tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    film = processor.prompt("?", videos=[[picture, picture]]).media[0]
    cases = [
        ({"images": [tmp_path / "none.png"]}, r"images\[0\] .*no picture at"),
        ({"images": [picture, broken]}, r"images\[1\] .*no picture that can be read"),
        ({"images": [Image.new("L", (2010, 10))]}, "more than 200 times"),
        ({"images": ["https://localhost:1/a.png"]}, "not fetched unless"),
        ({"images": [film]}, "Media of kind 'video'"),
        ({"images": "a.png"}, "images= is a list"),
        ({"images": [picture], "max_pixels": 5}, "max_pixels 5"),
        ({"videos": [[]]}, "no frame"),
        ({"videos": [broken]}, "encode it again|can be read"),
        ({"videos": [Media("video", film.pixels, film.grid)]}, "no times"),
    ]
    for given, match in cases:
        with pytest.raises(PromptError, match=match):
            processor.prompt("?", **given)
    with pytest.raises(PromptError, match="1 images and 0 videos, and the chat template made .* 2 images"):
        processor.prompt(f"What is {PAD}?", images=[picture], allow_control_tokens=True)
    with pytest.raises(PromptError, match="message of the user"):
        processor.prompt([{"role": "system", "content": "x"}], images=[picture])


def test_a_prompt_over_the_context_names_its_pictures(processor, picture):
    with pytest.raises(PromptError, match="6 of them for pictures"):
        replace(processor, context_length=10).prompt("?", images=[picture])


def folder_with(tmp_path: Path, **files) -> Path:
    """A copy of the demo's small files, some replaced (None: left out)."""
    for file in demo_folder().iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path)
    for name, content in files.items():
        path = tmp_path / f"{name}.json"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_text(json.dumps(content))
    return tmp_path


def opened(folder: Path) -> Processor:
    return Processor.from_folder(folder, read_config(folder))


def test_both_settings_in_one_file(processor, picture, frames, tmp_path):
    image, video = (json.loads((demo_folder() / f"{n}preprocessor_config.json").read_text()) for n in ("", "video_"))
    together = {"image_processor": image, "video_processor": video}
    alone = {"preprocessor_config": None, "video_preprocessor_config": None}
    folder = folder_with(tmp_path, processor_config=together, **alone)
    assert opened(folder).media_limits == processor.media_limits
    folder = folder_with(tmp_path, processor_config={"image_processor": image}, **alone)
    assert opened(folder).prompt("?", images=[picture]).media
    with pytest.raises(PromptError, match="no video_preprocessor_config.json"):
        opened(folder).prompt("?", videos=[frames])


@pytest.mark.parametrize(
    ("change", "match"),
    [({"patch_size": 14}, "patch_size is 14, the vision tower"), ({"merge_size": 1}, "merge_size is 1"),
     ({"image_mean": [0.5]}, "three numbers"), ({"temporal_patch_size": 1}, "temporal_patch_size is 1")],
)  # fmt: skip
def test_settings_of_another_model(tmp_path, change, match):
    config = json.loads((demo_folder() / "preprocessor_config.json").read_text()) | change
    with pytest.raises(CheckpointError, match=match):
        opened(folder_with(tmp_path, preprocessor_config=config))
