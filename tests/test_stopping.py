"""Wherever an answer ends, the cache covers the prompt and exactly the tokens that were handed out."""

import io
import threading
from types import SimpleNamespace

import mlx.core as mx
import pytest

from mlx_qwen35.generation import stream_generate
from mlx_qwen35.model import Model
from mlx_qwen35.sampling import Sampler, Sampling
from tests.talkers import PROMPT, VOCAB, Letters, Typist, assert_covers, greedy, random_model, recomputed


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request) -> Model:
    return random_model(request.param)


@pytest.fixture(scope="module")
def dense() -> Model:
    return random_model("dense")


# Where an answer can end. Each leaves the generator after `n` parts in its own way.


def by_length(model, cache):
    return list(greedy(model, cache=cache, max_tokens=4))


def by_one_token(model, cache):
    return list(greedy(model, cache=cache, max_tokens=1))


def by_end_of_turn(model, cache):
    processor = Typist()
    processor.eos_token_ids = frozenset({recomputed(model, PROMPT, 3)[-1]})
    parts = list(stream_generate(model, processor, PROMPT, sampling=Sampling(), cache=cache))
    assert parts[-1].finish_reason == "stop"
    return parts


def by_stop_string(model, cache):
    processor = Typist()
    spelled = iter("abcdefghij")
    processor.tokenizer = SimpleNamespace(vocab_size=VOCAB, token_bytes=lambda token: next(spelled).encode())
    parts = list(stream_generate(model, processor, PROMPT, sampling=Sampling(), cache=cache, stop="cd"))
    assert "".join(part.text for part in parts) == "ab"
    assert parts[-1].finish_reason == "stop" and parts[-1].token is not None
    return parts


def by_event(model, cache):
    cancel, parts = threading.Event(), []
    for part in greedy(model, cache=cache, cancel=cancel):
        parts.append(part)
        if len(parts) == 3:
            cancel.set()
    assert parts[-1].finish_reason == "cancelled" and parts[-1].token is None
    assert parts[-1].generation_tokens == 3
    return parts


def by_callable(model, cache):
    parts = []
    for part in greedy(model, cache=cache, cancel=lambda: len(parts) >= 2):
        parts.append(part)
    assert parts[-1].finish_reason == "cancelled"
    return parts


def by_close(model, cache):
    stream = greedy(model, cache=cache)
    parts = [next(stream) for _ in range(3)]
    stream.close()
    return parts


def by_close_at_once(model, cache):
    stream = greedy(model, cache=cache)
    parts = [next(stream)]
    del stream
    return parts


def interrupted(model, cache, **options):
    parts = []
    with pytest.raises(KeyboardInterrupt):
        for part in greedy(model, cache=cache, **options):
            parts.append(part)
    assert 0 < len(parts) < 12
    return parts


def by_interrupt_in_the_forward_pass(model, cache):
    calls, layer = [], type(model.layers[0])
    forward = layer.__call__

    def failing(self, *arguments):
        calls.append(self)
        if len(calls) == 5 * len(model.layers) + 3:  # two layers of the sixth pass have taken their token
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer, "__call__", failing)
        return interrupted(model, cache)


def by_interrupt_between_token_and_part(model, cache):
    # the cache has the token already, the caller never gets it
    tokens = []

    def token_bytes(self, token):
        tokens.append(token)
        if len(tokens) == 4:
            raise KeyboardInterrupt
        return b"x"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Letters, "token_bytes", token_bytes)
        return interrupted(model, cache)


def by_interrupt_while_sampling(model, cache):
    calls, draw = [], Sampler.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return draw(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Sampler, "__call__", failing)
        return interrupted(model, cache)


ENDS = [
    by_length,
    by_one_token,
    by_end_of_turn,
    by_stop_string,
    by_event,
    by_callable,
    by_close,
    by_close_at_once,
    by_interrupt_in_the_forward_pass,
    by_interrupt_between_token_and_part,
    by_interrupt_while_sampling,
]


@pytest.mark.parametrize("ends", ENDS)
def test_the_cache_covers_the_prompt_and_what_was_handed_out(dense, ends):
    cache = dense.make_cache()
    tokens = [part.token for part in ends(dense, cache) if part.token is not None]
    assert tokens == recomputed(dense, PROMPT, len(tokens))
    assert_covers(dense, cache, PROMPT + tokens)


@pytest.mark.parametrize("ends", [by_length, by_end_of_turn, by_stop_string, by_event, by_close, by_close_at_once])
def test_nothing_in_the_cache_waits_to_be_computed(dense, ends):
    cache, graph = dense.make_cache(), io.StringIO()
    ends(dense, cache)
    mx.export_to_dot(graph, *cache.arrays())
    assert "rectangle" not in graph.getvalue()  # an operation


def test_an_interrupt_while_the_moe_model_runs(model):
    cache = model.make_cache()
    tokens = [part.token for part in by_interrupt_in_the_forward_pass(model, cache)]
    assert_covers(model, cache, PROMPT + tokens)


def test_a_cancelled_prefill_keeps_whole_chunks(dense):
    cache, progress = dense.make_cache(), []
    parts = list(
        greedy(
            dense,
            cache=cache,
            chunk_size=2,
            on_progress=lambda *at: progress.append(at),
            cancel=lambda: progress[-1:] == [(4, len(PROMPT))],
        )
    )
    assert [(part.token, part.finish_reason, part.prompt_tokens) for part in parts] == [(None, "cancelled", 4)]
    assert_covers(dense, cache, PROMPT[:4])


def test_an_interrupted_prefill_keeps_whole_chunks(dense, monkeypatch):
    cache, calls, layer = dense.make_cache(), [], type(dense.layers[0])
    forward = layer.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == len(dense.layers) + 2:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(layer, "__call__", failing)
        list(greedy(dense, cache=cache, chunk_size=4))
    assert_covers(dense, cache, PROMPT[:4])


def test_cancelled_before_it_began(dense):
    cache = dense.make_cache()
    parts = list(greedy(dense, cache=cache, cancel=lambda: True))
    assert [(part.token, part.text, part.finish_reason) for part in parts] == [(None, "", "cancelled")]
    assert cache.offset == 0
