"""What a head guesses in one round is what it would say to all pairs at once, each at its own position."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.speculative.drafters import HeadDrafter
from mlx_qwen35.speculative.pace import Pace
from tests.drafted import random_head, with_head
from tests.talkers import PROMPT


@pytest.fixture(scope="module", params=["dense", "moe"])
def headed(request):
    model, head, _ = with_head(request.param)
    return model, random_head(head)


def said_at_once(model, head, tokens, hidden, first, positions, count):
    """Logits of `count` guesses after `first`, everything anew for each: no cache, all positions written out."""
    pairs, said = [*tokens[1:], first], []
    for number in range(count):
        places = [*positions, *(positions[-1] + 1 + more for more in range(number))]
        out = head(model.embed_tokens(mx.array([pairs])), hidden, mx.array([places]))
        said.append(np.array(model.head(out[:, -1:])[0, -1]))
        pairs = [*pairs, int(said[-1].argmax())]
        hidden = mx.concatenate([hidden, out[:, -1:]], axis=1)
    return said


@pytest.mark.parametrize("waiting", [1, 3])
@pytest.mark.parametrize("shift", [0, 400])
def test_guesses_stand_one_behind_the_other(headed, shift, waiting):
    """shift: as behind a picture, where positions are not counts of tokens. waiting: tokens that the head has not taken
    in when it is asked."""
    model, head = headed
    cache = model.make_cache()
    drafter = HeadDrafter(model, cache, Pace(4), head)
    hidden = model.hidden(mx.array([PROMPT]), cache)
    positions = [*range(4), *range(4 + shift, len(PROMPT) + shift)]
    tokens, places = mx.array([PROMPT]), mx.broadcast_to(mx.array(positions), (3, 1, len(PROMPT)))
    first, rest = slice(0, 1 - waiting or None), slice(len(PROMPT) + 1 - waiting, None)
    drafter.prime(tokens[:, first], hidden[:, first], places[..., first])
    if waiting > 1:
        drafter.follow(tokens[:, rest], hidden[:, rest], places[..., rest])
    found = []

    def choose(logits):
        found.append(np.array(logits[0]))
        return mx.argmax(logits, axis=-1)

    drafter.guess(mx.array([42]), 4, choose)
    wanted = said_at_once(model, head, PROMPT, hidden, 42, positions, 4)
    for guess, whole in zip(found, wanted, strict=True):
        np.testing.assert_allclose(guess, whole, atol=2e-3)
    # guesses were no part of what the head knows: another round from the same place says the same
    assert drafter._held == len(PROMPT)
