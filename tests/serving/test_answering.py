"""What was asked of the demo, through the pool, on a server's event loop."""

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlx_qwen35 import Sampling, load, stream_generate
from mlx_qwen35.model import model
from mlx_qwen35.serving import exchange
from mlx_qwen35.serving.answering import EngineAnswering
from mlx_qwen35.serving.exchange import Alive, Ask, Finished
from mlx_qwen35.serving.refusal import Refusal
from tests.serving.running import Running, running

QUESTION = [{"role": "user", "content": "What is 17 + 25?"}]
WITHOUT_END = {991: -100.0, 993: -100.0}  # of the demo's tokens, those that end a turn
LONG = [{"role": "user", "content": "kite stone owl " * 200}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with pytest.MonkeyPatch.context() as patch, running(parallel=4) as made:
        patch.setattr(model, "PREFILL_CHUNK", 128)  # so that little is computed before somebody looks up
        made.call(made.pool.load("demo", context_length=4095))
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    yield
    assert server.becomes_idle()


async def finished(server: Running, ask: Ask) -> tuple[list[Finished], EngineAnswering]:
    answering = await EngineAnswering.of(server.pool, ask)
    try:
        return await answering.finished(), answering
    finally:
        answering.close()


def answer(server: Running, ask: Ask) -> tuple[Finished, EngineAnswering]:
    made, answering = server.call(finished(server, ask))
    assert len(made) == 1
    return made[0], answering


def greedy(prompt: Any = QUESTION, **options: Any) -> Ask:
    return Ask("demo", prompt, {"max_tokens": 60, **options}, {"temperature": 0.0})


def test_it_says_what_generate_says(server: Running) -> None:
    made, answering = answer(server, greedy())
    parts = list(stream_generate(*load("demo"), QUESTION, max_tokens=60, sampling=Sampling()))
    assert made.tokens == [part.token for part in parts if part.token is not None]
    assert made.text == "".join(part.text for part in parts)
    assert made.reasoning == "".join(part.reasoning for part in parts) != ""
    assert made.content == "".join(part.content for part in parts) and "42" in made.content
    assert made.finish_reason == parts[-1].finish_reason
    usage = answering.usage
    assert usage.prompt_tokens == parts[-1].prompt_tokens and usage.answer_tokens == len(made.tokens)
    assert 0 < usage.reasoning_tokens < usage.answer_tokens
    assert answering.prompt_seconds > 0 and answering.answer_seconds >= 0 and answering.load_seconds == 0
    assert answering.ended == made.finish_reason and len(answering.id) == 24 and answering.model == "demo"


def test_cached_tokens_are_of_the_prompt(server: Running) -> None:
    ask = greedy([{"role": "user", "content": "Reverse these words: " + "stone, kite, owl, " * 40}], max_tokens=4)
    (_, first), (_, second) = answer(server, ask), answer(server, ask)
    assert first.usage.prompt_tokens == second.usage.prompt_tokens
    assert second.usage.cached_tokens > first.usage.cached_tokens
    assert second.usage.cached_tokens < second.usage.prompt_tokens


def test_the_models_own_sampling_and_what_differs(server: Running) -> None:
    one = Ask(None, QUESTION, {"max_tokens": 12}, {"temperature": 20.0, "top_k": 0, "top_p": 1.0, "seed": 7})
    assert answer(server, one)[0].tokens == answer(server, one)[0].tokens
    other = Ask(None, QUESTION, {"max_tokens": 12}, {**one.sampling, "seed": 8})
    assert answer(server, one)[0].tokens != answer(server, other)[0].tokens
    forbidden = answer(server, greedy(max_tokens=3))[0].tokens[0]
    biased = Ask(None, QUESTION, {"max_tokens": 3}, {"temperature": 0.0, "logit_bias": {forbidden: -100.0}})
    assert answer(server, biased)[0].tokens[0] != forbidden


@pytest.mark.parametrize(
    "sampling, options, says",
    [
        ({"temperature": -1.0}, {}, "temperature"),
        ({"top_p": 0.0}, {}, "top_p"),
        ({"nonsense": 1}, {}, "nonsense"),
        ({"seed": -1}, {}, "seed"),
        ({"logit_bias": {10**6: 1.0}}, {}, "logit_bias"),
        ({"temperature": 10**400}, {}, "temperature|large"),
        ({}, {"max_tokens": -1}, "max_tokens"),
        ({}, {"nonsense": 1}, "nonsense"),
        ({}, {"stop": [""]}, "stop"),
        ({}, {"response_format": {"type": "nonsense"}}, "response_format"),
        ({}, {"tools": [{"type": "function"}]}, "tools"),
    ],
)
def test_what_cannot_be_asked(server: Running, sampling: dict[str, Any], options: dict[str, Any], says: str) -> None:
    with pytest.raises(Refusal, match=says) as told:
        answer(server, Ask(None, QUESTION, options, sampling))
    assert told.value.status == 400


def test_a_prompt_that_is_too_long_has_numbers(server: Running) -> None:
    with pytest.raises(Refusal) as told:
        answer(server, greedy([{"role": "user", "content": "kite " * 6000}]))
    assert told.value.kind == "too_long" and told.value.tokens > 4095 == told.value.most
    loaded = server.pool.places[0].loaded
    ids = loaded.processor.tokenizer.encode("kite")
    with pytest.raises(Refusal) as told:
        answer(server, greedy((ids * 5000)[:4095]))
    assert told.value.kind == "too_long" and told.value.tokens == 4095 and told.value.most == 4094


def test_a_plain_text_may_spell_control_tokens(server: Running) -> None:
    processor = server.pool.places[0].loaded.processor
    text = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n"
    ids = processor.tokenizer.encode(text)
    assert processor.tokenizer.token_id("<|im_start|>") in ids
    options = {"max_tokens": 20}
    plain = Ask(None, text, options, {"temperature": 0.0}, plain=True)
    made, answering = answer(server, plain)
    assert answering.usage.prompt_tokens == len(ids)
    assert made.tokens == answer(server, Ask(None, ids, options, {"temperature": 0.0}, plain=True))[0].tokens


def test_several_answers(server: Running) -> None:
    ask = Ask(None, QUESTION, {"max_tokens": 8, "n": 3, "logprobs": True}, {"temperature": 1.0, "seed": 3})
    made, answering = server.call(finished(server, ask))
    assert len(made) == 3 and answering.usage.answer_tokens == sum(len(one.tokens) for one in made)
    for one in made:
        assert [token for token, _, _ in one.logprobs] == one.tokens and all(p <= 0 for _, p, _ in one.logprobs)
        assert b"".join(map(answering.token_bytes, one.tokens)).decode() == "".join(
            map(answering.token_text, one.tokens)
        )


def test_it_says_that_it_goes_on(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a long prompt is read; and nothing of the answer is lost."""
    monkeypatch.setattr(exchange, "ALIVE_EVERY", 0.02)

    async def told() -> tuple[list[Alive], list[Any]]:
        answering = await EngineAnswering.of(server.pool, greedy(LONG, max_tokens=5))
        alive, parts = [], []
        async for each in answering:
            (alive if isinstance(each, Alive) else parts).append(each)
        return alive, parts

    alive, parts = server.call(told())
    assert alive and all(0 <= each.done <= each.total for each in alive) and alive[-1].total > 700
    assert parts[-1].finish_reason and len([part for part in parts if part.token is not None]) == 5


def endless(prompt: Any = QUESTION) -> Ask:
    return Ask(None, prompt, {}, {"temperature": 0.0, "logit_bias": WITHOUT_END})


def test_who_goes_away_ends_it(server: Running) -> None:
    async def some() -> int:
        answering = await EngineAnswering.of(server.pool, endless())
        seen = 0
        async for part in answering:
            seen += not isinstance(part, Alive)
            if seen == 3:
                break
        answering.close()
        return seen

    assert server.call(some()) == 3
    assert server.becomes_idle(1)


def test_who_goes_away_while_the_prompt_is_read(server: Running) -> None:
    engine = server.pool.places[0].loaded.engine

    async def asked(prompt: Any) -> None:
        answering = await EngineAnswering.of(server.pool, endless(prompt))
        assert await answering.started(10)
        await asyncio.sleep(0.02)
        answering.close()

    before = engine.computed_tokens
    unknown = [{"role": "user", "content": "owl queen jacket violin " * 500}]
    server.call(asked(unknown))
    assert server.becomes_idle(5)
    assert engine.computed_tokens - before <= 512  # a piece or some: the rest of 3,000 is not computed


def test_who_goes_away_at_once(server: Running) -> None:
    async def asked() -> None:
        for _ in range(5):
            answering = await EngineAnswering.of(server.pool, endless())
            await asyncio.sleep(0)
            answering.close()
            answering.close()

    server.call(asked())
    assert server.becomes_idle(2)


def test_cancelled_while_it_waits_for_all_of_it(server: Running) -> None:
    async def asked() -> None:
        answering = await EngineAnswering.of(server.pool, endless())
        waiting = asyncio.ensure_future(answering.finished())
        await asyncio.sleep(0.2)
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        answering.close()

    server.call(asked())
    assert server.becomes_idle(2)


def test_loading_alone(server: Running) -> None:
    async def asked(ttl: float | None) -> list[Finished]:
        return (await finished(server, Ask(None, "", ttl=ttl, load_only=True)))[0]

    assert server.call(asked(5.0)) == []
    place = server.pool.places[0]
    assert place.loaded is not None and place.ttl == 5.0
    assert server.call(asked(0.0)) == []
    until = time.monotonic() + 5
    while place.loaded is not None and time.monotonic() < until:
        time.sleep(0.01)
    assert place.loaded is None
    _, answering = answer(server, greedy(max_tokens=1))
    assert answering.load_seconds > 0


def test_a_model_that_goes_in_the_middle_is_told(server: Running) -> None:
    async def asked() -> None:
        answering = await EngineAnswering.of(server.pool, endless())
        seen = 0
        with pytest.raises(Refusal) as told:
            async for _ in answering:
                seen += 1
                if seen == 2:
                    loaded = server.pool.places[0].loaded
                    asyncio.get_running_loop().run_in_executor(None, loaded.engine.close)
        assert told.value.status == 503 and seen >= 2 and "unavailable" in answering.ended

    server.call(asked())
    assert server.becomes_idle()
    server.call(server.pool.unload("demo"))
    assert answer(server, greedy(max_tokens=2))[0].tokens
