"""Pieces of several prompts in one call: each row has what it has alone, whatever the lengths and offsets."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cache.ragged import Block, RaggedCache, grouped
from mlx_qwen35.engine.prefill import Left, Prefill, compute
from mlx_qwen35.kernels.gated_delta import gated_delta
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.speculative import Drafting
from tests.drafted import near, random_head
from tests.talkers import VOCAB
from tests.tiny_model import tiny_model

ATOL = 2e-4  # of what is about 1
PASTS = (0, 7, 1, 33, 300, 2)
LENGTHS = (5, 19, 1, 70, 3, 33)
ROPE = {"partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]}
YARN = ROPE | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.fixture(scope="module", params=["dense", "moe", "yarn", "8 bits", "4 bits from 9 on"])
def model(request):
    name = request.param
    more = {"rope_parameters": YARN if name == "yarn" else ROPE, "head_dim": 32}
    model, _ = tiny_model("moe" if name == "moe" else "dense", **more)
    model.eval()
    model.kv_form = {"8 bits": KVFormat(8, 32), "4 bits from 9 on": KVFormat(4, 32, 9)}.get(name)
    return model


def ids(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, length).tolist()


def read(model, tokens: list[int]) -> Cache:
    cache = model.make_cache()
    if tokens:
        mx.eval(model.hidden(mx.array([tokens]), cache), cache.arrays())
    return cache


def assert_alike(one: Cache, other: Cache, atol: float = ATOL) -> None:
    assert (one.offset, one.rope_delta) == (other.offset, other.rope_delta)
    assert [getattr(layer, "offset", None) for layer in one] == [getattr(layer, "offset", None) for layer in other]
    for own, theirs in zip(one.snapshot().arrays(), other.snapshot().arrays(), strict=True):
        assert own.shape == theirs.shape
        np.testing.assert_allclose(np.array(own), np.array(theirs), atol=atol)


def test_each_row_has_what_it_has_alone(model):
    packed = model.kv_form is not None  # rounding then decides between two values of few bits
    caches = [[read(model, ids(past, past)) for past in PASTS] for _ in range(2)]
    for side in caches:
        side[1].rope_delta = -4  # as after a picture
        side[3] = side[3].branch()[0]
    pieces = [mx.array([ids(length, 50 + length)]) for length in LENGTHS]
    ragged = RaggedCache(caches[0], LENGTHS)
    hidden = model.hidden(mx.concatenate(pieces, axis=1), ragged)
    mx.eval(hidden, [cache.arrays() for cache in caches[0]])
    for row, (piece, alone) in enumerate(zip(pieces, caches[1], strict=True)):
        expected = model.hidden(piece, alone)
        part = hidden[:, ragged.spans[row]]
        np.testing.assert_allclose(np.array(part), np.array(expected), atol=0.05 if packed else ATOL)
        assert_alike(caches[0][row], alone, atol=0.05 if packed else ATOL)
        again, same = (model.hidden(mx.array([[3]]), cache) for cache in (caches[0][row], alone))
        np.testing.assert_allclose(np.array(again), np.array(same), atol=0.05 if packed else ATOL)


def test_a_row_keeps_no_other_alive(model):
    caches = [model.make_cache() for _ in LENGTHS]
    tokens = mx.concatenate([mx.array([ids(length, length)]) for length in LENGTHS], axis=1)
    mx.eval(model.hidden(tokens, RaggedCache(caches, LENGTHS)), [cache.arrays() for cache in caches])
    own, before = caches[2].nbytes, mx.get_active_memory()
    others = sum(cache.nbytes for cache in caches) - own
    del caches[:2], caches[1:]
    assert before - mx.get_active_memory() > 0.9 * others


@pytest.mark.parametrize("tokens", [1, 3, 16, 40])
def test_zeros_leave_a_state_as_it_is_to_the_bit(tokens):
    rng = np.random.default_rng(3)
    state = mx.array(rng.standard_normal((2, 4, 6, 10)).astype(np.float32))
    zeros, heads = mx.zeros((2, tokens, 2, 10)), mx.zeros((2, tokens, 4, 6))
    _, after = gated_delta(zeros, zeros, heads, mx.ones((2, tokens, 4)), mx.zeros((2, tokens, 4)), state)
    assert mx.array_equal(after, state).item()


def test_windows_stand_before_their_tokens():
    block = Block([2, 0], [3, 1], [4, 0])
    x = mx.arange(1, 9)[None, :, None]  # the call has row 0: 1, row 1: 2 3 4, row 2: 5 6 7
    made = block.windowed(x, [None, mx.array([[[11], [12]]])], 2)
    assert made.squeeze(-1).tolist() == [[0, 0, 5, 6, 7], [0, 0, 11, 12, 1]]
    assert block.present.tolist() == [[True] * 3, [False, False, True]] and block.tokens.tolist()[0] == [4, 5, 6]


def test_rows_are_taken_together_where_few_places_are_filled_up():
    assert grouped([12, 9, 24, 4]) == [[2, 0, 1, 3]]
    assert grouped([1000, 12, 9, 900]) == [[0, 3], [1, 2]]
    assert grouped([300, 250, 310, 280]) == [[2, 0, 3, 1]]


def prompts(model, covered: int = 0, **options) -> list[Prefill]:
    found = []
    for length in LENGTHS:
        cache = read(model, ids(length + 9, length)[:covered])
        found.append(Prefill(model, ids(length + 9, length), cache, covered=covered, **options))
    return found


def drafting(model, by: str) -> Drafting:
    if by == "head":
        head = random_head(MTPHead(model.config.text))
        model.take_mtp(head)
        return Drafting(head, 2)
    return Drafting(near("dense", 0, seed=4), 2)


def guesses(cache: Cache) -> np.ndarray:
    found = []

    def choose(logits):
        found.append(logits)
        return mx.array([5])

    cache.draft.guess(mx.array([7]), 2, choose)
    return np.array(mx.concatenate(found))


@pytest.mark.parametrize("by", ["head", "model"])
@pytest.mark.parametrize("covered", [0, 3])
def test_snapshots_on_the_way_and_what_drafts(by, covered):
    """Also of rows whose places lie elsewhere, and of those without."""
    model = near("moe", 0)
    made = []
    for together in (True, False):
        kept = [[] for _ in LENGTHS]
        reading = prompts(model, covered)
        for row, prefill in enumerate(reading):
            prefill._cache.draft = drafting(model, by).drafter(model, prefill._cache)
            prefill._places = lambda row=row: [[], [2, 11], [1, prompts_length(row) - covered - 4]][row % 3]
            prefill._on_place = kept[row].append
        pieces = [prefill.next(None) for prefill in reading]
        logits = compute(pieces) if together else [compute([piece])[0] for piece in pieces]
        for piece in pieces:
            piece.tell()
        made.append((reading, kept, logits))
    sides = [part for pair in zip(*made, strict=True) for part in pair]
    for one, other, kept, theirs, *logits in zip(*sides, strict=True):
        np.testing.assert_allclose(*map(np.array, logits), atol=10 * ATOL)
        assert one.done == other.done == one.total
        caches = one._cache, other._cache
        assert_alike(*caches)
        np.testing.assert_allclose(*map(guesses, caches), atol=10 * ATOL)
        assert [snapshot.offset for snapshot in kept] == [snapshot.offset for snapshot in theirs]
        for snapshots in reversed([*zip(kept, theirs, strict=True)]):
            assert not snapshots[0].parts
            for cache, snapshot in zip(caches, snapshots, strict=True):
                cache.restore(snapshot)
            assert_alike(*caches)
            np.testing.assert_allclose(*map(guesses, caches), atol=10 * ATOL)


def prompts_length(row: int) -> int:
    return LENGTHS[row] + 9


def test_an_error_leaves_all_caches_as_they_were(model, monkeypatch):
    reading = prompts(model, 3)
    before = [[np.array(a) for a in prefill._cache.snapshot().arrays()] for prefill in reading]
    with monkeypatch.context() as broken:
        broken.setattr(model, "head", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            compute([prefill.next(None) for prefill in reading])
    for prefill, arrays in zip(reading, before, strict=True):
        assert prefill._cache.offset == 3 and not prefill.done
        for own, old in zip(prefill._cache.snapshot().arrays(), arrays, strict=True):
            assert np.array_equal(np.array(own), old)


def test_a_long_call_is_left_when_all_are_to_end():
    model, left = near("dense", 0), [True, False]
    reading = [Prefill(model, ids(200, n), model.make_cache(), leaves=lambda n=n: left[n]) for n in range(2)]
    assert len(compute([prefill.next(150) for prefill in reading])) == 2
    left[1] = True
    with pytest.raises(Left):
        compute([Prefill(model, ids(200, n), model.make_cache(), leaves=lambda: True).next(150) for n in range(2)])
