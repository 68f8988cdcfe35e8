"""Prompts with pictures and videos against prompts.json: what transformers makes of the same conversations.

Each conversation is asked in every form there is for it. Needs no torch; for published files it needs the folder of
reference material.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.library import demo_folder
from mlx_qwen35.processor import Processor, Prompt
from mlx_qwen35.vision import positions as place
from tests.golden.vision.conversations import NAMED
from tests.golden.vision.digests import levels_digest, positions_digest
from tests.published import write_published_files

EXPECTED = json.loads((Path(__file__).parent / "vision" / "prompts.json").read_text())
Files = tuple[Processor, ModelConfig, dict[str, Any]]


@pytest.fixture(scope="module", params=["demo", "published"])
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Files:
    """A processor, the configuration of its model, and what is expected of it."""
    folder = demo_folder()
    if request.param == "published":
        model_data = request.getfixturevalue("shared_dir") / "model_data"
        folder = write_published_files(model_data, tmp_path_factory.mktemp("published"))
    config = ModelConfig.from_folder(folder)
    return Processor.from_folder(folder, config), config, EXPECTED[request.param]


def unpacked(tokens: list[int | list[int]]) -> list[int]:
    return [token for item in tokens for token in ([item] if isinstance(item, int) else [item[0]] * item[1])]


def described(prompt: Prompt, config: ModelConfig, expected: dict[str, Any]) -> dict[str, Any]:
    """What prompts.json holds, of a prompt."""
    ids = {"image_token_id": config.image_token_id, "video_token_id": config.video_token_id}
    positions, delta = place.positions(np.array(prompt.tokens), prompt.media, merge=2, **ids)
    media = []
    for medium, (*_, levels) in zip(prompt.media, expected["media"], strict=True):
        times = [round(time, 6) for time in medium.timestamps]
        media.append([medium.kind, list(medium.grid), times, levels and levels_digest(medium.pixels)])
    return {
        "tokens": list(prompt.tokens),
        "media": media,
        "positions": positions_digest(positions),
        "delta": delta,
    }


def test_every_conversation_is_there() -> None:
    assert EXPECTED["demo"].keys() == EXPECTED["published"].keys() == NAMED.keys()
    assert len(NAMED) >= 40


@pytest.mark.parametrize("name", NAMED)
def test_prompt(files: Files, name: str, tmp_path: Path) -> None:
    processor, config, cases = files
    conversation = NAMED[name]
    if conversation.needs_av:
        pytest.importorskip("av", reason="PyAV is not installed (extra 'video'): video files cannot be made or read")
    expected = {**cases[name], "tokens": unpacked(cases[name]["tokens"])}
    for form, asked, beside in conversation.forms(tmp_path):
        prompt = processor.prompt(asked, **beside, **conversation.options)
        assert described(prompt, config, expected) == expected, form


@pytest.mark.parametrize("name", NAMED)
def test_prepared_messages_make_the_same_prompt(files: Files, name: str, tmp_path: Path) -> None:
    processor, _, _ = files
    conversation = NAMED[name]
    if conversation.needs_av:
        pytest.importorskip("av", reason="PyAV is not installed (extra 'video'): video files cannot be made or read")
    messages, options = conversation.drawn(tmp_path), dict(conversation.options)
    whole = processor.prompt(messages, **options)
    reading = {name: options.pop(name) for name in ("fps", "max_pixels") if name in options}
    prepared = processor.prepare(messages, **reading)
    later = processor.prompt(prepared, **options)
    assert later.tokens == whole.tokens and [m.key for m in later.media] == [m.key for m in whole.media]
    parts = [part for message in prepared if isinstance(message["content"], list) for part in message["content"]]
    read = [part[part["type"]] for part in parts if part["type"] != "text"]
    assert all(ours is theirs for ours, theirs in zip(later.media, read, strict=True)), "they were read once more"
