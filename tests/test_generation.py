"""Generation: the tokens are those of a loop that recomputes everything; text, limits, batches and statistics."""

import re

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.errors import PromptError
from mlx_qwen35.generation import decode, generate, generate_batch, prefill, statistics, stream_generate
from mlx_qwen35.model import Model
from mlx_qwen35.sampling import History, Sampler, Sampling
from tests.talkers import (
    END,
    PROMPT,
    VOCAB,
    Endless,
    Script,
    Typist,
    assert_covers,
    greedy,
    random_model,
    recomputed,
    say,
    spell,
)


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request) -> Model:
    return random_model(request.param)


@pytest.fixture(scope="module")
def dense() -> Model:
    return random_model("dense")


def test_greedy_tokens_are_those_of_a_recomputing_loop(model):
    parts = list(greedy(model, chunk_size=3))
    assert [part.token for part in parts] == recomputed(model, PROMPT, 12)
    assert [part.generation_tokens for part in parts] == list(range(1, 13))
    assert [part.finish_reason for part in parts] == [None] * 11 + ["length"]
    assert {part.prompt_tokens for part in parts} == {len(PROMPT)}
    assert {part.cached_tokens for part in parts} == {0}
    last = parts[-1]
    assert last.prompt_tps > 0 and last.generation_tps > 0 and last.peak_memory > 0
    logits = np.array(model(mx.array([[*PROMPT, *(part.token for part in parts[:4])]]), None)[0, -1])
    expected = logits - np.log(np.exp(logits.astype(np.float64)).sum())
    np.testing.assert_allclose(np.array(parts[4].logprobs), expected, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 2, 7, 100])
def test_chunked_prefill_is_the_whole(model, chunk_size):
    progress = []
    cache = model.make_cache()
    logits = prefill(model, PROMPT, cache, chunk_size=chunk_size, on_progress=lambda *at: progress.append(at))
    np.testing.assert_allclose(np.array(logits), np.array(model(mx.array([PROMPT]))[:, -1]), atol=1e-3)
    done = [*range(0, len(PROMPT), chunk_size), len(PROMPT)]
    assert progress == [(at, len(PROMPT)) for at in done]
    assert_covers(model, cache, PROMPT)


def test_prefill_computes_the_head_for_the_last_row_only(dense, monkeypatch):
    shapes = []
    head = Model.head
    monkeypatch.setattr(Model, "head", lambda self, hidden: shapes.append(hidden.shape) or head(self, hidden))
    prefill(dense, PROMPT, dense.make_cache(), chunk_size=3)
    assert [shape[:2] for shape in shapes] == [(1, 1)]


def test_prefill_stops_at_boundaries_where_a_snapshot_can_be_taken(dense):
    cache, kept = dense.make_cache(), []

    def on_progress(done, total):
        if done == 5:
            kept.append(cache.snapshot())

    prefill(dense, PROMPT, cache, chunk_size=4, boundaries=[0, 5, 99], on_progress=on_progress)
    cache.restore(kept[0])
    assert_covers(dense, cache, PROMPT[:5])


def test_a_cache_is_continued(model):
    cache = model.make_cache()
    first = [part.token for part in greedy(model, cache=cache, max_tokens=3)]
    parts = list(greedy(model, [20, 21], cache=cache, max_tokens=3))
    assert [part.token for part in parts] == recomputed(model, [*PROMPT, *first, 20, 21], 3)
    assert (parts[0].prompt_tokens, parts[0].cached_tokens) == (2, len(PROMPT) + 3)


def test_one_token_is_fed_once(dense):
    script = say("hello")
    list(stream_generate(script, Typist(), PROMPT, chunk_size=5))
    assert script.fed == [PROMPT[:5], PROMPT[5:], *([token] for token in spell("hello")), [END]]


def test_max_tokens_nothing_and_no_limit(dense):
    cache = dense.make_cache()
    parts = list(greedy(dense, cache=cache, max_tokens=0))
    assert [(part.token, part.finish_reason) for part in parts] == [(None, "length")]
    assert cache.offset == len(PROMPT)
    parts = list(greedy(dense, max_tokens=None, context_length=len(PROMPT) + 9))
    assert len(parts) == 9 and parts[-1].finish_reason == "length"


def test_text_reasons_and_the_end_of_turn():
    parts = list(stream_generate(say("It is 5€."), Typist(), PROMPT))
    assert [part.text for part in parts] == ["I", "t", " ", "i", "s", " ", "5", "", "€", ".", ""]
    assert parts[-1].token == END and parts[-1].finish_reason == "stop"
    # cut off inside a character
    parts = list(stream_generate(say("5€"), Typist(), PROMPT, max_tokens=2))
    assert [part.text for part in parts] == ["5", "\ufffd"]
    assert parts[-1].finish_reason == "length"


@pytest.mark.parametrize(
    "said, stop, shown, reason",
    [
        ("one two three", "two", "one ", "stop"),
        ("one two three", ["zzz", "o th"], "one tw", "stop"),
        ("one two", "two!", "one two", "stop"),  # a beginning of a stop string comes out at the end
        ("5€ and 6€", "€ and 6€", "5", "stop"),
        ("aaab", "aab", "a", "stop"),
        ("two", "two", "", "stop"),
    ],
)
def test_stop_strings_never_leak(said, stop, shown, reason):
    parts = list(stream_generate(say(said), Typist(), PROMPT, stop=stop))
    assert "".join(part.text for part in parts) == shown
    assert "".join(part.content for part in parts) == shown.strip()
    assert parts[-1].finish_reason == reason
    assert len([part for part in parts if part.finish_reason]) == 1
    came = [each for each in ([stop] if isinstance(stop, str) else stop) if each in said]
    assert parts[-1].stop_string == (came[0] if came else None)
    assert not any(part.stop_string for part in parts[:-1])


def test_what_was_held_back_comes_out_at_the_length_and_when_cancelled():
    parts = list(stream_generate(say("abcdef"), Typist(), PROMPT, stop="defx", max_tokens=5))
    assert [part.text for part in parts] == ["a", "b", "c", "", "de"]
    parts = []
    for part in stream_generate(say("abcdef"), Typist(), PROMPT, stop="defx", cancel=lambda: len(parts) == 5):
        parts.append(part)
    assert [part.text for part in parts] == ["a", "b", "c", "", "", "de"]
    assert parts[-1].finish_reason == "cancelled"


def test_reasoning_content_and_tool_calls_are_told_apart():
    call = "<tool_call>\n<function=add>\n<parameter=a>\n3\n</parameter>\n</function>\n</tool_call>"
    said = f"I should add.</think>Adding: {call}".replace("\n", " ")
    tools = [
        {
            "type": "function",
            "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        }
    ]
    parts = list(stream_generate(say(said), Typist(), PROMPT, tools=tools, enable_thinking=True))
    assert "".join(part.text for part in parts) == said
    assert "".join(part.reasoning for part in parts) == "I should add."
    assert "".join(part.content for part in parts) == "Adding:"
    (found,) = [found for part in parts for found in part.tool_calls]
    assert found.name == "add"
    assert generate(say(said), Typist(), PROMPT, enable_thinking=True) == said
    assert generate(say(said), Typist(), PROMPT, enable_thinking=True, content_only=True) == "Adding:"


def test_errors_come_before_anything_is_computed():
    class Untouched(Script):
        def hidden(self, tokens, cache, media=(), **more):
            raise AssertionError("computed")

    model = Untouched(0, [])
    with pytest.raises(PromptError, match="empty"):
        stream_generate(model, Typist(), [])
    with pytest.raises(PromptError, match="7 tokens.*holds 7"):
        stream_generate(model, Typist(), PROMPT, context_length=7)
    cache = model.make_cache()
    cache.offset = 5
    with pytest.raises(PromptError, match="7 tokens after 5 in the cache.*holds 12"):
        stream_generate(model, Typist(), PROMPT, context_length=12, cache=cache)
    processor = Typist()
    processor.context_length = 6
    with pytest.raises(PromptError, match="holds 6"):
        generate_batch(model, processor, [[1], PROMPT])
    with pytest.raises(PromptError, match="stop string"):
        stream_generate(model, Typist(), PROMPT, stop=[""])
    for token in (-1, VOCAB):
        sampling = Sampling(logit_bias={3: 1.0, token: 2.0})
        with pytest.raises(ValueError, match=f"token {token}; the vocabulary has ids 0 to {VOCAB - 1}"):
            stream_generate(model, Typist(), PROMPT, sampling=sampling)
        with pytest.raises(ValueError, match=f"token {token};"):
            generate_batch(model, Typist(), [PROMPT], sampling=sampling)
    with pytest.raises(PromptError, match="the prompt is empty"):
        generate_batch(model, Typist(), [PROMPT, []])


def test_sampling_comes_from_the_generation_config_unless_given(dense):
    processor = Endless()
    processor.generation_config = {"do_sample": True, "temperature": 5.0}
    tokens = [part.token for part in stream_generate(dense, processor, PROMPT, max_tokens=12)]
    assert tokens != recomputed(dense, PROMPT, 12)
    sampling = Sampling(temperature=1.0, seed=3)
    runs = [[part.token for part in greedy(dense, sampling=sampling)] for _ in range(2)]
    assert runs[0] == runs[1]


def test_the_repetition_penalty_knows_prompt_answer_and_cached_tokens(dense):
    def loop(tokens, count):
        tokens = list(tokens)
        for _ in range(count):
            logits = np.array(dense(mx.array([tokens]))[0, -1])
            seen = sorted(set(tokens))
            logits[seen] = np.where(logits[seen] < 0, logits[seen] * 3, logits[seen] / 3)
            tokens.append(int(logits.argmax()))
        return tokens[-count:]

    sampling = Sampling(repetition_penalty=3.0)
    cache = dense.make_cache()
    first = [part.token for part in greedy(dense, sampling=sampling, cache=cache, max_tokens=8)]
    assert first == loop(PROMPT, 8)
    known = [*PROMPT, *first]
    start = cache.snapshot()
    more = [
        part.token
        for part in greedy(dense, [*known, 20], sampling=sampling, cache=cache, covered=len(known), max_tokens=20)
    ]
    assert more == loop([*known, 20], 20)
    cache.restore(start)
    unaware = [part.token for part in greedy(dense, [20], sampling=sampling, cache=cache, max_tokens=20)]
    assert unaware != more


def test_a_batch_is_its_rows_alone(model):
    prompts = [PROMPT, [4], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0], [50, 51]]
    answers = generate_batch(model, Endless(), prompts, max_tokens=6, sampling=Sampling(), chunk_size=4)
    for prompt, answer in zip(prompts, answers, strict=True):
        alone = list(greedy(model, prompt, max_tokens=6))
        assert list(answer.tokens) == [part.token for part in alone]
        assert answer.text == "".join(part.text for part in alone)
        assert (answer.prompt_tokens, answer.finish_reason) == (len(prompt), alone[-1].finish_reason)


def test_the_rows_of_a_batch_end_on_their_own():
    model = Script(3, [*spell("ab"), END], spell("abcdefghij"), spell("xSTOPy"))
    answers = generate_batch(model, Typist(), [[1, 2, 3], [4, 5, 6], [7, 8, 9]], max_tokens=8, stop="STOP")
    assert [(answer.text, answer.finish_reason) for answer in answers] == [
        ("ab", "stop"),
        ("abcdefgh", "length"),
        ("x", "stop"),
    ]
    assert answers[0].tokens == (*spell("ab"), END)
    assert generate_batch(model, Typist(), []) == []


def test_a_cancelled_batch_gives_what_there_is():
    model = Script(3, spell("abcdef"), [*spell("x"), END])
    fed = model.fed
    answers = generate_batch(
        model, Typist(), [[1, 2, 3], [4, 5, 6]], max_tokens=9, stop="cz", cancel=lambda: len(fed) >= 8
    )
    assert [(answer.text, answer.finish_reason) for answer in answers] == [("abcd", "cancelled"), ("x", "stop")]


def test_statistics_read_as_mlx_lm_prints_them(capsys):
    text = generate(say("hello"), Typist(), PROMPT, verbose=True)
    printed = capsys.readouterr().out
    assert text == "hello" and printed.startswith("hello\n==========\n")
    number = r"\d+\.\d{3}"
    assert re.fullmatch(
        rf"Prompt: 7 tokens, {number} tokens-per-sec\n"
        rf"Generation: 6 tokens, {number} tokens-per-sec\n"
        rf"Peak memory: {number} GB\n",
        printed.partition("==========\n")[2],
    )
    cache = Cache([])
    cache.offset = 4
    *_, last = stream_generate(Script(len(PROMPT) + 4, [END]), Typist(), PROMPT, cache=cache)
    assert "(4 more from the cache)" in statistics(last)


def test_the_next_token_is_on_its_way_before_one_is_read(dense, monkeypatch):
    """Its graph, and all of the cache with it, is handed to the device before the step is given out."""
    begun, real = [], mx.async_eval

    def begin(*given):
        begun.append([array for one in given for array in (one if isinstance(one, list) else [one])])
        real(*given)

    monkeypatch.setattr(mx, "async_eval", begin)
    cache = dense.make_cache()
    logits = prefill(dense, PROMPT, cache)
    sampler, history = Sampler(Sampling()), History(Sampling(), [PROMPT], VOCAB)
    tokens = []
    for number, step in enumerate(decode(dense, cache, logits, sampler, history, max_tokens=4), start=1):
        tokens.append(step.token)
        assert len(begun) == number + 1  # the first token alone, then one call a step
        wanted = {id(array) for array in cache.arrays()}
        assert wanted and wanted <= {id(array) for array in begun[-1]}
        assert len(begun[-1]) == len(cache.arrays()) + (number < 4)  # no token is drawn that nobody asked for
        if number < 4:
            (ahead,) = [array for array in begun[-1] if id(array) not in wanted]
            assert ahead.tolist() == recomputed(dense, [*PROMPT, *tokens], 1)
    assert tokens == recomputed(dense, PROMPT, 4)
