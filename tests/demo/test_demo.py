"""The checkpoint inside the package: what transformers computes with it, and whether it still answers by rule.

Knows the vectors and answers that tools/train_demo/evaluate.py wrote. Needs no torch.
"""

import json
import random
import re
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import Sampling, load
from mlx_qwen35.cli.demo import DEMO_HINT, DEMO_PROMPT
from mlx_qwen35.generation import generate_batch, stream_generate
from mlx_qwen35.library import demo_folder
from tests.conftest import CHECKOUT
from tests.soak import examples

CURRICULUM = CHECKOUT / "tools" / "train_demo"
HERE = Path(__file__).resolve().parent
GREEDY = Sampling(temperature=0.0)


@pytest.fixture(scope="module")
def demo():
    return load()


def accuracy() -> dict:
    return json.loads((CURRICULUM / "accuracy.json").read_text())


def test_the_files_together_are_small():
    assert sum(f.stat().st_size for f in demo_folder().iterdir()) <= 16_000_000


def test_the_reference_was_asked_about_every_skill(curriculum):
    assert accuracy()["accuracy"].keys() == {*curriculum.TEXT_SKILLS, *curriculum.PICTURE_SKILLS}
    pictures = {"png", "jpeg"}
    files = {"what": pictures, "where": pictures, "count": pictures, "differ": pictures, "video": {"mp4"}}
    assert {skill: {*shares} for skill, shares in accuracy()["files"].items()} == files


def test_every_skill_was_learned():
    assert min(accuracy()["accuracy"].values()) >= 0.95
    assert min(accuracy()["first_draft_accepted"].values()) >= 0.6


def test_no_expert_is_dead():
    assert min(layer["least"] for layer in accuracy()["expert_use"]) > 0.05


def test_logits_are_those_of_transformers(demo, curriculum):
    """Of the first held-out question of each text skill, and of some about pictures and a video."""
    model, processor = demo
    skills = curriculum.TEXT_SKILLS | curriculum.PICTURE_SKILLS
    with np.load(HERE / "vectors.npz") as vectors:
        named = {name.removeprefix("ids_") for name in vectors if name.startswith("ids_")}
        assert named == {*curriculum.TEXT_SKILLS, "what", "differ", "video"}
        for skill in sorted(named):
            (case,) = curriculum.held_out_set({skill: skills[skill]}, 1)
            prompt = processor.prompt(case.messages, tools=case.tools, enable_thinking=case.thought is not None)
            tokens = prompt.tokens + processor.encode(case.reply + "<|im_end|>")
            assert tokens == vectors[f"ids_{skill}"].tolist(), skill
            logits = model(mx.array(tokens)[None], None, list(prompt.media))[0]
            assert np.abs(np.array(logits) - vectors[f"logits_{skill}"]).max() <= 2e-3, skill


def test_held_out_questions_are_answered(demo, curriculum):
    """A few of each skill, as often right as with transformers; benchmarks/skills.py asks many."""
    model, processor = demo
    cases = list(curriculum.held_out_set(curriculum.TEXT_SKILLS, examples(12, 2, least=6)))
    prompts = [processor.prompt(c.messages, tools=c.tools, enable_thinking=c.thought is not None) for c in cases]
    answers = generate_batch(model, processor, prompts, max_tokens=120, sampling=GREEDY)
    right = [c.is_right(a.text) for c, a in zip(cases, answers, strict=True)]
    reference = [accuracy()["accuracy"][c.skill] for c in cases]
    assert abs(sum(right) - sum(reference)) <= 0.05 * len(cases)


def test_a_tool_is_called_with_typed_arguments(demo, curriculum):
    model, processor = demo
    tools = [curriculum.TOOLS[name][0] for name in ("set_timer", "get_weather")]
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


def test_what_is_said_to_ask_is_answered(demo):
    model, processor = demo
    questions = re.findall(r'"([^"]+)"', DEMO_HINT)
    readme = " ".join((CHECKOUT / "README.md").read_text().split())
    assert len(questions) == 3 and questions[0] == DEMO_PROMPT
    assert all(f'"{question}"' in readme for question in questions)
    for question in questions:
        words = question.partition(": ")[2].rstrip("?").split(", ")
        right = ", ".join(sorted(words) if "Sort" in question else reversed(words)) if len(words) > 1 else "42"
        parts = stream_generate(model, processor, question, sampling=GREEDY, max_tokens=120)
        assert "".join(part.content for part in parts).strip() == right


def test_the_split_keeps_held_out_questions_apart(curriculum):
    for maker in curriculum.TEXT_SKILLS.values():
        rng = random.Random(1)
        trained = {curriculum.draw(maker, rng, held_out=False).key for _ in range(200)}
        asked = {c.key for c in curriculum.held_out_set({"skill": maker}, 10)}
        assert not trained & asked
