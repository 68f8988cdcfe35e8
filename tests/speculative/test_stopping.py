"""With drafts too, wherever an answer ends, the cache covers the prompt and exactly the tokens that were handed out."""

import io

import mlx.core as mx
import pytest

from mlx_qwen35.model import DecoderLayer
from tests import test_stopping as plain
from tests.drafted import always, near
from tests.talkers import PROMPT, assert_covers, greedy, random_model, recomputed

ENDS = [
    plain.by_length,
    plain.by_one_token,
    plain.by_end_of_turn,
    plain.by_stop_string,
    plain.by_event,
    plain.by_callable,
    plain.by_close,
    plain.by_close_at_once,
    plain.by_interrupt_between_token_and_part,
]


@pytest.fixture
def model(monkeypatch):
    """Three guesses a round, of which often some are right and some are not."""
    always(monkeypatch, 3)
    model = random_model("dense")
    model.take_mtp(near("dense", 0.02))
    return model


@pytest.mark.parametrize("ends", ENDS)
def test_the_cache_covers_the_prompt_and_what_was_handed_out(model, ends):
    cache, graph = model.make_cache(), io.StringIO()
    tokens = [part.token for part in ends(model, cache) if part.token is not None]
    mx.export_to_dot(graph, *cache.arrays())
    assert "rectangle" not in graph.getvalue(), "something in the cache waits to be computed"
    assert tokens == recomputed(model, PROMPT, len(tokens))
    assert_covers(model, cache, PROMPT + tokens)


@pytest.mark.parametrize("at", [10, 13, 21, 23, 30, 37, 41, 60])
def test_interrupted_in_any_layer_of_either_model(model, monkeypatch, at):
    calls, forward = [], DecoderLayer.__call__

    def failing(self, *arguments):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt
        return forward(self, *arguments)

    cache, tokens = model.make_cache(), []
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(DecoderLayer, "__call__", failing)
        for part in greedy(model, cache=cache, max_tokens=30):
            tokens.append(part.token)
    assert tokens == recomputed(model, PROMPT, len(tokens))[: len(tokens)]
    more = [part.token for part in greedy(model, [8, 9], cache=cache)]
    assert more == recomputed(model, [*PROMPT, *tokens, 8, 9], 12)
