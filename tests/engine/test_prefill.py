"""A prompt that is computed in one piece leaves snapshots on the way, each as if a piece had ended there."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.engine.prefill import Prefill
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.speculative import Drafting
from tests.drafted import near, random_head
from tests.seeing_model import prompt_of, seeing_model, some_media

PLACES = [1, 3, 19, 38, 52]  # the first is shorter than a window, and 19 and 38 lie in no multiples of a chunk
ATOL = 1e-4  # of what is about 1


@pytest.fixture(scope="module", params=["dense", "moe"])
def model(request):
    model, _ = seeing_model(request.param, rms_norm_eps=1e-2)
    model.take_mtp(random_head(MTPHead(model.config.text)))
    return model


def prompt(seeing: bool):
    if not seeing:
        return prompt_of(61)
    return prompt_of(2, some_media("image", 4, 6, seed=1), 9, some_media("video", 2, 4, 4, seed=3), 40, seed=5)


def whole(model, seeing, cache, *, places=(), pausing=False, most=None, covered=0, stops=()):
    """The logits of the last token, and the snapshots on the way."""
    (tokens, media), kept = prompt(seeing), []
    prefill = Prefill(
        model, tokens, cache, media=media, covered=covered, places=lambda: places, on_place=kept.append,
        stops=lambda: stops,
    )  # fmt: skip
    prefill.begin()
    pieces = 1
    while (logits := prefill.piece(most, pausing=pausing)) is None:
        pieces += 1
    return np.array(logits), kept, pieces


def guesses(cache) -> np.ndarray:
    found = []

    def choose(logits):
        found.append(logits)
        return mx.array([5])

    cache.draft.guess(mx.array([7]), 2, choose)
    return np.array(mx.concatenate(found))


@pytest.mark.parametrize("seeing", [False, True])
@pytest.mark.parametrize("most", [None, 20])
def test_a_snapshot_on_the_way_is_that_of_a_piece_that_ends_there(model, seeing, most):
    cache = model.make_cache()
    logits, kept, pieces = whole(model, seeing, cache, places=PLACES, most=most)
    length = len(prompt(seeing)[0])
    assert pieces == (1 if most is None else -(-length // most)) and [one.offset for one in kept] == PLACES
    assert not any(one.parts for one in kept) and not cache.snapshot().parts
    alone = model.make_cache()
    expected, none, cut = whole(model, seeing, alone, stops=PLACES)
    assert not none and cut == 1 + len(PLACES)
    np.testing.assert_allclose(logits, expected, atol=ATOL)
    for snapshot in reversed(kept):
        beside = model.make_cache()
        cache.restore(snapshot)
        tokens, media = prompt(seeing)
        part = Prefill(model, tokens, beside, media=media, stops=lambda at=snapshot.offset: [at])
        assert part.piece() is None and beside.offset == cache.offset and beside.rope_delta == cache.rope_delta
        for own, theirs in zip(snapshot.arrays(), beside.snapshot().arrays(), strict=True):
            np.testing.assert_allclose(np.array(own), np.array(theirs), atol=ATOL)
        again, _, _ = whole(model, seeing, cache, covered=snapshot.offset)
        np.testing.assert_allclose(again, expected, atol=ATOL)


def test_a_piece_pauses_where_it_is_told_to(model):
    cache = model.make_cache()
    _, kept, pieces = whole(model, False, cache, places=[3, 19], pausing=True)
    assert pieces == 3 and not kept


@pytest.mark.parametrize("seeing", [False, True])
@pytest.mark.parametrize("by", ["head", "model"])
def test_what_drafts_goes_back_with_it(model, seeing, by):
    small = model.mtp if by == "head" else seeing_model("dense", seed=4, rms_norm_eps=1e-2)[0]
    drafting = Drafting(small, 2)
    cache = model.make_cache()
    cache.draft = drafting.drafter(model, cache)
    _, kept, _ = whole(model, seeing, cache, places=PLACES)
    for snapshot in reversed(kept):
        beside = model.make_cache()
        beside.draft = drafting.drafter(model, beside)
        tokens, media = prompt(seeing)
        Prefill(model, tokens, beside, media=media, stops=lambda at=snapshot.offset: [at]).piece()
        cache.restore(snapshot)
        there = beside.snapshot()
        np.testing.assert_allclose(guesses(cache), guesses(beside), atol=10 * ATOL)
        cache.restore(snapshot)
        beside.restore(there)
        whole(model, seeing, cache, covered=snapshot.offset)
        whole(model, seeing, beside, covered=snapshot.offset)
        np.testing.assert_allclose(guesses(cache), guesses(beside), atol=10 * ATOL)


def test_an_interrupt_leaves_the_cache_as_it_was(model, monkeypatch):
    cache = model.make_cache()
    kept = []
    prefill = Prefill(model, prompt_of(61)[0], cache, places=lambda: [9, 30], on_place=kept.append)
    prefill.piece(5)
    before = [np.array(array) for array in cache.snapshot().arrays()]
    with monkeypatch.context() as broken:
        broken.setattr(model, "head", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prefill.piece()
    assert cache.offset == 5 and not kept
    for own, old in zip(cache.snapshot().arrays(), before, strict=True):
        assert np.array_equal(np.array(own), old)
    assert prefill.piece() is not None and [one.offset for one in kept] == [9, 30]


def test_calls_that_are_cut_anywhere_keep_the_same_steps():
    """As where a layer takes its tokens in tiles, which the places know nothing of."""
    model, tokens = near("moe", 0), mx.array([prompt_of(15)[0]])
    caches = [model.make_cache() for _ in range(2)]
    for cache, cuts in zip(caches, ([15], [5, 7, 3]), strict=True):
        start = 0
        with cache.each_step([3, 5, 6, 12, 14]) as kept:
            for length in cuts:
                mx.eval(model.hidden(tokens[:, start : start + length], cache))
                start += length
        assert [one.offset for one in kept] == [3, 5, 6, 12, 14]
        cache.kept = kept
    for one, other in zip(*(cache.kept for cache in caches), strict=True):
        for own, theirs in zip(one.arrays(), other.arrays(), strict=True):
            np.testing.assert_allclose(np.array(own), np.array(theirs), atol=ATOL)
