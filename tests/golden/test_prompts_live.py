"""Prompts, and what models compute of them, against transformers on the spot: random conversations, random sizes.

Needs torch, transformers and PyAV, and is skipped without them; test_prompts.py holds stored ones without.
"""

import shutil
from itertools import combinations, pairwise, product
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed: the reference cannot run")
pytest.importorskip("transformers", reason="transformers is not installed: there is no reference")
pytest.importorskip("av", reason="PyAV is not installed (extra 'video'): video files cannot be made")

import torch
from transformers import AutoModelForImageTextToText

from mlx_qwen35 import load_model
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.library import demo_folder
from mlx_qwen35.processor import Processor
from mlx_qwen35.vision import positions as place
from tests import figures
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.golden.vision.conversations import NAMED, Conversation, Shown, random_conversation, user
from tests.reference_processor import ReferenceProcessor

PIXELS = 1e-6
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json",
              "video_preprocessor_config.json")  # fmt: skip
# The published heads: norms over the 8 to 16 values of tiny_config's make 1e-2 of the last bits of features, and in
# transformers 2e-3 (float32 against its own float64).
HEADS = {
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
}


@pytest.fixture(scope="module")
def both() -> tuple[Processor, ReferenceProcessor]:
    folder = demo_folder()
    return Processor.from_folder(folder, ModelConfig.from_folder(folder)), ReferenceProcessor(folder)


def test_the_reference_puts_a_pair_around_a_video_that_the_released_form_has_not(both, tmp_path: Path) -> None:
    """What tests/reference_processor.py takes out, and nothing else."""
    _, reference = both
    messages = NAMED["text, video"].drawn(tmp_path)
    frames = [np.stack([np.asarray(frame) for frame in messages[0]["content"][1]["video"]])]
    text = reference.processor.apply_chat_template(messages, add_generation_prompt=True)
    metadata = [{"total_num_frames": 6, "fps": 2.0, "frames_indices": [*range(6)]}]
    options = {"video_metadata": metadata, "do_sample_frames": False}
    own = reference.processor(text=[text], videos=frames, videos_kwargs=options)["input_ids"][0]
    start, end = reference.processor.vision_start_token_id, reference.processor.vision_end_token_id
    first, last = own.index(start), len(own) - 1 - own[::-1].index(end)
    assert own[last - 1] == end
    assert own[:first] + own[first + 1 : last] + own[last + 1 :] == reference.prompt(messages).tokens


@pytest.mark.parametrize("seed", range(60))
def test_random_conversation(both, seed: int, tmp_path: Path) -> None:
    ours, reference = both
    conversation = random_conversation(seed)
    messages = conversation.drawn(tmp_path)
    expected = reference.prompt(messages, **conversation.options)
    prompt = ours.prompt(messages, **conversation.options)
    assert prompt.tokens == expected.tokens
    assert [(m.kind, m.grid) for m in prompt.media] == [(kind, grid) for kind, grid, *_ in expected.media]
    for medium, (_, _, times, pixels) in zip(prompt.media, expected.media, strict=True):
        assert medium.timestamps == pytest.approx(times, abs=1e-9)
        assert np.abs(medium.pixels - pixels).max() <= PIXELS
    config = ours.config
    positions, delta = place.positions(
        np.array(prompt.tokens), prompt.media, merge=2,
        image_token_id=config.image_token_id, video_token_id=config.video_token_id,
    )  # fmt: skip
    there, theirs = expected.positions()
    assert np.array_equal(positions, there) and delta == theirs


def test_random_conversations_are_of_every_kind() -> None:
    shown = [random_conversation(seed).shown for seed in range(60)]
    orders = {(a.kind, b.kind) for media in shown for a, b in combinations(media, 2)}
    assert orders == set(product(("image", "video"), repeat=2))
    assert sum(any(s.rate for s in media) for media in shown) >= 5


@pytest.fixture(scope="module", params=["dense", "moe"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights behind the demo's tokenizer, template and preprocessor files."""
    folder = tmp_path_factory.mktemp(request.param)
    ids = ModelConfig.from_folder(demo_folder())
    config = tiny_config(request.param, vision=True, vocab_size=ids.text.vocab_size, eos_token_id=0, **HEADS)
    config |= {name: getattr(ids, name) for name in config if name.endswith("_token_id")}
    config["vision_config"] |= {"patch_size": 16}
    write_checkpoint(folder, config, random_tensors(config))
    for name in TEXT_FILES:
        shutil.copy(demo_folder() / name, folder)
    return folder


def image(height: int, width: int) -> Shown:
    return Shown(height, width, seed=height + width)


def frames(count: int, height: int, width: int) -> Shown:
    return Shown(height, width, count, seed=count + height)


SEEN = {
    "image": [image(96, 128)],
    "several": [image(64, 64), "and", image(64, 64), image(160, 32)],
    "video": [frames(5, 64, 96)],
    "image, video": [image(64, 96), frames(4, 64, 64)],
    "video, image": [frames(4, 64, 64), image(64, 96)],
    "image, video, image, video": [image(64, 64), frames(2, 96, 64), "then", image(96, 64), frames(3, 64, 64)],
    "video, image, image, video": ["First", frames(3, 64, 64), image(64, 64), image(32, 160), frames(4, 64, 64)],
}


@pytest.mark.parametrize("name", SEEN)
def test_logits(tiny: Path, name: str, tmp_path: Path) -> None:
    messages = Conversation((user(*SEEN[name], "What is this?"),)).drawn(tmp_path)
    expected = ReferenceProcessor(tiny).prompt(messages)
    reference = AutoModelForImageTextToText.from_pretrained(tiny, dtype=torch.float32).eval()
    with torch.no_grad():
        theirs = reference(**expected.inputs).logits[0].numpy()
    model = load_model(tiny)
    prompt = Processor.from_folder(tiny, model.config).prompt(messages)
    assert prompt.tokens == expected.tokens
    tokens = mx.array(prompt.tokens)[None]
    sight = model.see(tokens, prompt.media)
    inside = 3 + next(i for i, (a, b) in enumerate(pairwise(prompt.tokens)) if a == b)  # of the first run
    for cuts in ([0, len(prompt.tokens)], [0, inside, len(prompt.tokens)]):
        cache = model.make_cache()
        parts = [model(tokens[:, a:b], cache, sight[a:b]) for a, b in pairwise(cuts)]
        figures.hold(figures.SEEING, float(np.abs(np.array(mx.concatenate(parts, axis=1))[0] - theirs).max()))
