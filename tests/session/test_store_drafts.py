"""What drafts for a row goes with it through the store: guesses are those of a row that computed all itself."""

import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.session import paths
from mlx_qwen35.session.store import Store
from mlx_qwen35.speculative import Drafting
from tests.drafted import random_head
from tests.session.rows import Row, answered
from tests.session.test_properties import guesses as guessed
from tests.session.test_store import TRUNK, asked
from tests.tiny_model import tiny_model

MODEL, SMALL = tiny_model(rms_norm_eps=1e-2)[0], tiny_model(seed=3, rms_norm_eps=1e-2)[0]
MODEL.take_mtp(random_head(MTPHead(MODEL.config.text)))
DRAFTINGS = {"head": Drafting(MODEL.mtp, 2), "model": Drafting(SMALL, 2)}


def guesses(cache: Cache) -> np.ndarray:
    """Guesses, and all is as it was."""
    before = cache.snapshot()
    found = guessed(cache)
    cache.restore(before)
    return found


def computed(store: Store, prompt, drafting: Drafting) -> Row:
    row = Row(store, prompt, drafting=drafting)
    assert row.begin()
    while not row.step():
        pass
    return row


@pytest.mark.parametrize("share_from", [8192, 100])
@pytest.mark.parametrize("kind", DRAFTINGS)
def test_guesses_are_those_of_a_row_alone(monkeypatch, kind, share_from):
    monkeypatch.setattr(paths, "SHARE_FROM", share_from)
    drafting, store = DRAFTINGS[kind], Store(MODEL, most_bytes=1 << 30)
    leader = computed(store, asked(TRUNK[:200], 1, 2, turns=(0, 200, 201)), drafting)
    before = guesses(leader.session.cache)
    prompt = asked(TRUNK[:200], 4, 5, 6)
    follower = computed(store, prompt, drafting)
    assert follower.computed == 3 and follower.session.cache.draft is not leader.session.cache.draft
    alone = computed(Store(MODEL, most_bytes=0), prompt, drafting)
    np.testing.assert_allclose(guesses(follower.session.cache), guesses(alone.session.cache), atol=1e-4)
    np.testing.assert_allclose(guesses(leader.session.cache), before, atol=1e-4)  # nor was the leader's touched
    leader.end()
    store.drop(follower.session)
    while leader.session.cache.offset > 200:
        assert store.give_up(1)
    again = computed(store, prompt, drafting)
    np.testing.assert_allclose(guesses(again.session.cache), guesses(alone.session.cache), atol=1e-4)


def test_the_head_comes_back_from_the_disk(tmp_path):
    store, prompt = Store(MODEL, most_bytes=0, directory=tmp_path), asked(TRUNK[:150], 1)
    answered(store, asked(TRUNK[:200], 1), 5, drafting=DRAFTINGS["head"])
    answered(store, asked(TRUNK[:150], 7), drafting=DRAFTINGS["head"])
    store.close()
    row = computed(Store(MODEL, most_bytes=1 << 30, directory=tmp_path), prompt, DRAFTINGS["head"])
    alone = computed(Store(MODEL, most_bytes=0), prompt, DRAFTINGS["head"])
    assert row.computed == 1
    np.testing.assert_allclose(guesses(row.session.cache), guesses(alone.session.cache), atol=1e-4)
