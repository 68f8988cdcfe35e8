"""The scripted chat of 20 turns on the demo: nothing is computed twice, and all comes out as from scratch."""

from collections import Counter

import mlx.core as mx
import numpy as np
import pytest

from benchmarks import chat_script
from mlx_qwen35 import Sampling, load
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.session import Session
from mlx_qwen35.text.screen import call_record


def message(parts):
    said = {"role": "assistant", "content": "".join(part.content for part in parts)}
    if reasoning := "".join(part.reasoning for part in parts):
        said["reasoning_content"] = reasoning
    if calls := [call for part in parts for call in part.tool_calls]:
        said["tool_calls"] = [{"type": "function", "function": call_record(call)} for call in calls]
    return said


@pytest.fixture(scope="module")
def played():
    """Of each answer: the prompt, how many of its tokens begin as what was computed before, parts, spacing, logits."""
    model, processor = load()
    session, answers = Session(model), []

    def answer(messages):
        prompt = processor.prompt(messages, system=chat_script.SYSTEM, tools=chat_script.TOOLS, enable_thinking=True)
        before = session.tokens
        shared = next((n for n, (a, b) in enumerate(zip(before, prompt.tokens, strict=False)) if a != b), len(before))
        options = {"session": session, "tools": chat_script.TOOLS, "max_tokens": 60, "sampling": Sampling()}
        parts = list(stream_generate(model, processor, prompt, **options))
        answers.append((prompt, shared, parts, session.spacing, np.array(parts[0].logprobs)))
        return message(parts)

    chat_script.play(answer)
    return model, answers


def test_what_it_is_made_of(played):
    _, answers = played
    has = Counter()
    for prompt, _, parts, *_ in answers:
        has["thinking"] += any(part.reasoning for part in parts)
        has["calls"] += sum(len(part.tool_calls) for part in parts)
        has["pictures"] = len(prompt.media)
    assert len(answers) >= chat_script.TURNS
    assert has["thinking"] >= 10 and has["calls"] >= 3 and has["pictures"] == 12, has


def test_only_new_tokens_are_computed(played):
    _, answers = played
    again = []
    for prompt, shared, parts, spacing, _ in answers:
        computed, new = parts[-1].prompt_tokens, len(prompt.tokens) - shared
        assert computed + parts[-1].cached_tokens == len(prompt.tokens)
        assert new <= computed < new + spacing
        again.append(computed - new)
    # In truth no more than the few tokens between the snapshot before an answer and where the template rewrote it.
    assert max(again) <= 8, again


def test_logits_are_those_from_scratch(played):
    """Of every fourth answer, which is a minute less; benchmarks/sessions.py compares all."""
    model, answers = played
    for prompt, _, _, _, found in [*answers[::4], answers[-1]]:
        hidden = model.hidden(mx.array([prompt.tokens]), None, list(prompt.media))
        logits = model.head(hidden[:, -1:])[0, -1]
        fresh = np.array(logits - mx.logsumexp(logits))
        assert np.abs(found - fresh).max() <= 2e-3
        assert found.argmax() == fresh.argmax()
