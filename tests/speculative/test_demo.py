"""The demo's own head: it guesses well, in memory and streamed, and answers stay what they are."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import Sampling, generate, load, stream_generate
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library import demo_folder
from mlx_qwen35.speculative.copying import Copying
from mlx_qwen35.speculative.pace import Pace
from tests.drafted import always

QUESTIONS = ["What is 867 + 821?", "Sort these words: queen, jacket, violin", 'Repeat: {"open": [491, 3.7]}']


@pytest.fixture(scope="module")
def demo():
    return load(mtp=True)


@pytest.fixture(scope="module")
def streamed():
    """Six of sixteen experts of each layer in memory, of which a token takes four: three tokens do not fit at once."""
    plan = StreamPlan(slots=(6,) * 8, group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    model = load_model(demo_folder(), stream=plan)
    model.take_mtp(load_mtp(demo_folder(), model.config))
    yield model
    model.unload()


def answer(model, processor, question, **options):
    return list(stream_generate(model, processor, question, sampling=Sampling(), max_tokens=40, **options))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_same_answer_and_good_guesses(demo, monkeypatch, question):
    model, processor = demo
    plain = answer(model, processor, question, mtp=False)
    always(monkeypatch, 1)
    drafted = answer(model, processor, question)
    assert [part.token for part in drafted] == [part.token for part in plain]
    assert drafted[-1].accepted_tokens >= 0.8 * drafted[-1].drafted_tokens > 3
    always(monkeypatch, 4)
    many = answer(model, processor, question, num_draft_tokens=4)
    assert [part.token for part in many] == [part.token for part in plain]
    assert sum(part.from_draft for part in many) > len(many) / 3


def test_streamed_experts_verify_several_tokens_at_once(demo, streamed, monkeypatch):
    model, processor = demo
    plain = answer(model, processor, QUESTIONS[0], mtp=False)
    for count in (1, 4):
        always(monkeypatch, count)
        before = streamed.expert_stats
        drafted = answer(streamed, processor, QUESTIONS[0], num_draft_tokens=count)
        assert [part.token for part in drafted] == [part.token for part in plain]
        for mine, other in zip(drafted, plain, strict=True):
            assert np.array_equal(np.array(mine.logprobs), np.array(other.logprobs))
        assert drafted[-1].accepted_tokens > 5 and (streamed.expert_stats - before).misses > 0


@pytest.mark.parametrize("bits, start", [(8, 0), (4, 25)])
def test_keys_in_few_bits(monkeypatch, bits, start):
    """The prompt has 22 tokens: one of them is kept in few bits from the start, the other begins within the answer."""
    model, processor = load(mtp=True, kv_bits=bits, quantized_kv_start=start)
    plain = answer(model, processor, QUESTIONS[0], mtp=False)
    always(monkeypatch, 3)
    drafted = answer(model, processor, QUESTIONS[0])
    assert [part.token for part in drafted] == [part.token for part in plain]
    for mine, other in zip(drafted, plain, strict=True):
        assert np.array_equal(np.array(mine.logprobs), np.array(other.logprobs))
    assert drafted[-1].accepted_tokens > 5


def test_a_memory_ceiling_leaves_room_for_the_head(demo):
    mx.clear_cache()
    model, processor = load(memory="260MB", mtp=True, context_length=512)
    assert model.mtp is not None
    text = generate(model, processor, QUESTIONS[0], sampling=Sampling(), max_tokens=40)
    assert text == generate(*demo, QUESTIONS[0], sampling=Sampling(), max_tokens=40, mtp=False)
    model.unload()


def test_the_pace_of_a_conversation_is_kept(demo):
    """What was measured in one answer is known in the next."""
    model, processor = demo
    cache = model.make_cache()
    answer(model, processor, QUESTIONS[0], cache=cache)
    pace = cache.draft.pace
    assert isinstance(pace, Pace)
    answer(model, processor, [5, 6, 7], cache=cache)
    assert cache.draft.pace is pace
    answer(model, processor, [5, 6, 7], cache=cache, num_draft_tokens=1)
    assert cache.draft.pace.most == 1


def test_what_a_form_forces_is_drafted(demo, monkeypatch):
    monkeypatch.setattr(Copying, "choose", lambda self, kind, most, otherwise=None: most)
    model, processor = demo
    names = ["job", "code", "city"]
    form = {"type": "object", "properties": {name: {"enum": ["Rome", 5]} for name in names}, "required": names}
    options = {"response_format": form | {"additionalProperties": False}, "enable_thinking": False}
    plain = answer(model, processor, "Repeat: Anna", **options, mtp=False, lookup=False)
    for mtp in (False, True):
        parts = answer(model, processor, "Repeat: Anna", **options, mtp=mtp)
        assert [part.token for part in parts] == [part.token for part in plain]
        assert parts[-1].drafts["grammar"][1] > 3
