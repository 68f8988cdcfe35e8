"""The checkpoint inside the package: what transformers computes with it, and whether it still answers by rule.

Knows the vectors and answers that tools/train_demo/evaluate.py wrote. Needs no torch.
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import Sampling, load
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.library import demo_folder
from tests.conftest import CHECKOUT

CURRICULUM = CHECKOUT / "tools" / "train_demo"
HERE = Path(__file__).resolve().parent
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def curriculum():
    sys.path.insert(0, str(CURRICULUM))
    yield __import__("text_skills"), __import__("case")
    sys.path.remove(str(CURRICULUM))


def accuracy() -> dict:
    return json.loads((CURRICULUM / "accuracy.json").read_text())


def test_the_files_together_are_small():
    assert sum(f.stat().st_size for f in demo_folder().iterdir()) <= 16_000_000


def test_the_reference_was_asked_about_every_skill(curriculum):
    text_skills, _ = curriculum
    assert accuracy()["accuracy"].keys() >= {*text_skills.TEXT_SKILLS, "what", "where", "count", "differ", "video"}


def test_no_expert_is_dead():
    assert min(layer["least"] for layer in accuracy()["expert_use"]) > 0.05


def test_logits_are_those_of_transformers(demo):
    model, _ = demo
    with np.load(HERE / "vectors.npz") as vectors:
        prompts = sorted(name for name in vectors if name.startswith("ids"))
        assert len(prompts) >= 5
        for name in prompts:
            logits = model(mx.array(vectors[name])[None])[0]
            assert np.abs(np.array(logits) - vectors[name.replace("ids", "logits")]).max() <= 2e-3


def test_held_out_questions_are_answered(demo, curriculum):
    """A few of each skill, as often right as with transformers; benchmarks/skills.py asks many."""
    model, processor = demo
    text_skills, case = curriculum
    cases = list(case.held_out_set(text_skills.TEXT_SKILLS, 12))
    prompts = [processor.prompt(c.messages, tools=c.tools, enable_thinking=c.thought is not None) for c in cases]
    answers = generate_batch(model, processor, prompts, max_tokens=120, sampling=GREEDY)
    right = [c.is_right(a.text) for c, a in zip(cases, answers, strict=True)]
    reference = [accuracy()["accuracy"][c.skill] for c in cases]
    assert abs(sum(right) - sum(reference)) <= 0.1 * len(cases)


def test_a_tool_is_called_with_typed_arguments(demo, curriculum):
    model, processor = demo
    text_skills, _ = curriculum
    tools = [text_skills.TOOLS[name][0] for name in ("set_timer", "get_weather")]
    question = "How is the weather in Paris for 3 days?"
    parts = list(stream_generate(model, processor, question, tools=tools, sampling=GREEDY, max_tokens=120))
    calls = [call for part in parts for call in part.tool_calls]
    assert [(c.name, c.arguments) for c in calls] == [("get_weather", {"city": "Paris", "days": 3})]


def test_reasoning_comes_apart_from_the_answer(demo):
    model, processor = demo
    parts = list(stream_generate(model, processor, "What is 17 + 25?", sampling=GREEDY, max_tokens=120))
    assert "".join(p.content for p in parts).strip().isdigit()
    assert "7+5=" in "".join(p.reasoning for p in parts)
    assert parts[-1].finish_reason == "stop"


def test_the_split_keeps_held_out_questions_apart(curriculum):
    import random

    text_skills, case = curriculum
    for maker in text_skills.TEXT_SKILLS.values():
        rng = random.Random(1)
        trained = {case.draw(maker, rng, held_out=False).key for _ in range(200)}
        asked = {c.key for c in case.held_out_set({"skill": maker}, 10)}
        assert not trained & asked
