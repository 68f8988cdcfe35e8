"""The whole model on text, images and videos: against NumPy, and against itself cut, batched, padded, rolled back."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import PromptError
from mlx_qwen35.generation import prefill
from mlx_qwen35.vision.features import FeatureStore
from mlx_qwen35.vision.tower import VisionTower
from tests.seeing_model import IMAGE, prompt_of, run, seeing_model, some_media
from tests.tiny_model import tiny_model

TOLERANCE = 1e-3
LAYERS = {"layer_types": ["full_attention", "linear_attention", "full_attention"]}
ONE = some_media("image", 4, 6, seed=1)
TALL = some_media("image", 8, 4, seed=2)
FILM = some_media("video", 2, 4, 6, seed=3)
OTHER = some_media("image", 4, 6, seed=4)
PROMPTS = {
    "image": (3, ONE, 5),
    "image first and last": (ONE, 2, TALL),
    "images that touch": (2, ONE, OTHER, 3),
    "video": (4, FILM, 4),
    "mixed": (2, ONE, 3, FILM, 1, TALL, 2),
    "mixed the other way": (1, FILM, 1, ONE, 2, FILM, 3),
}


@pytest.fixture(scope="module")
def both():
    return seeing_model(**LAYERS)


@pytest.fixture(scope="module")
def model(both):
    return both[0]


@pytest.mark.parametrize("name", PROMPTS)
def test_equals_the_reference(both, name):
    model, reference = both
    tokens, media = prompt_of(*PROMPTS[name])
    wanted = reference.logits(tokens, media)
    blind = reference.logits([token % 80 for token in tokens])
    assert np.abs(wanted - blind).max() > 0.5
    np.testing.assert_allclose(np.array(model(mx.array([tokens]), None, media))[0], wanted, atol=TOLERANCE)
    np.testing.assert_allclose(run(model, tokens, media, [1]), wanted, atol=TOLERANCE)


def test_equals_the_reference_with_experts():
    model, reference = seeing_model("moe", **LAYERS)
    tokens, media = prompt_of(*PROMPTS["mixed"])
    np.testing.assert_allclose(
        np.array(model(mx.array([tokens]), None, media))[0], reference.logits(tokens, media), atol=TOLERANCE
    )


def test_cut_anywhere_is_whole(model):
    tokens, media = prompt_of(2, ONE, 2, FILM, 2)
    whole = np.array(model(mx.array([tokens]), None, media))[0]
    for cut in range(1, len(tokens)):
        np.testing.assert_allclose(run(model, tokens, media, [cut, len(tokens)]), whole, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 100])
def test_prefill_and_what_follows(both, chunk_size):
    model, reference = both
    tokens, media = prompt_of(3, ONE, 2, FILM, 2)
    answer = [5, 9, 11]
    wanted = reference.logits(tokens + answer, media)[len(tokens) - 1 :]
    cache = model.make_cache()
    found = [np.array(prefill(model, tokens, cache, media=media, chunk_size=chunk_size))[0]]
    found += [np.array(model(mx.array([[token]]), cache))[0, 0] for token in answer]
    np.testing.assert_allclose(np.stack(found), wanted, atol=TOLERANCE)


def test_a_picture_in_a_later_turn(both):
    model, reference = both
    first, second = prompt_of(3, ONE, 4), prompt_of(2, TALL, 3, seed=2)
    wanted = reference.logits(first[0] + second[0], [ONE, TALL])
    cache = model.make_cache()
    prefill(model, first[0], cache, media=first[1])
    found = model(mx.array([second[0]]), cache, second[1])[0]
    np.testing.assert_allclose(np.array(found), wanted[len(first[0]) :], atol=TOLERANCE)


@pytest.mark.parametrize("chunk_size", [1, 6, 100])
def test_a_batch_of_unequal_rows(model, chunk_size):
    prompts = [prompt_of(2, ONE, 3), prompt_of(1), prompt_of(1, FILM, TALL, 2), prompt_of(9)]
    width = max(len(tokens) for tokens, _ in prompts)
    padding = [width - len(tokens) for tokens, _ in prompts]
    cache = model.make_cache(len(prompts), padding)
    padded = mx.array([[IMAGE] * pad + tokens for pad, (tokens, _) in zip(padding, prompts, strict=True)])
    found = np.array(prefill(model, padded, cache, media=[media for _, media in prompts], chunk_size=chunk_size))
    following = np.array(model(mx.array([[5], [6], [7], [8]]), cache))[:, 0]
    for n, (tokens, media) in enumerate(prompts):
        alone = np.array(model(mx.array([tokens + [5 + n]]), None, media))[0]
        np.testing.assert_allclose(np.stack([found[n], following[n]]), alone[-2:], atol=1e-3)


def test_rollback_is_as_if_it_never_happened(model):
    cache = model.make_cache()
    prefill(model, [1, 2, 3], cache)
    snapshot = cache.snapshot()
    tokens, media = prompt_of(2, ONE, 3)
    first = np.array(prefill(model, tokens, cache, media=media))
    assert cache.rope_delta == 3 - 6  # six placeholders advance by the three columns
    cache.restore(snapshot)
    assert cache.rope_delta == 0
    np.testing.assert_array_equal(first, np.array(prefill(model, tokens, cache, media=media)))


def test_equal_sizes_swapped_are_two_answers(model):
    tokens, _ = prompt_of(3, ONE, 4)
    known: dict[str, mx.array] = {}
    answers = []
    for medium in (ONE, OTHER, ONE):
        sight = model.see(mx.array([tokens]), [medium], known=known)
        answers.append(np.array(model(mx.array([tokens]), None, sight)))
    np.testing.assert_array_equal(answers[0], answers[2])
    assert np.abs(answers[0] - answers[1]).max() > 0.1
    assert known.keys() == {ONE.key, OTHER.key}


def test_each_picture_is_encoded_once(model, monkeypatch):
    encode, seen = VisionTower.encode, []

    def watched(self, pixels, grids):
        seen.append(len(grids))
        return encode(self, pixels, grids)

    monkeypatch.setattr(VisionTower, "encode", watched)
    known: dict[str, mx.array] = {}
    again = some_media("image", 4, 6, seed=1)  # equal to ONE, and another object
    model.encode_media([ONE, TALL, ONE], known=known)
    features = model.encode_media([again, OTHER], known=known)
    assert seen == [2, 1] and features[0] is known[ONE.key]
    tokens, media = prompt_of(2, ONE, 1, ONE, 3)
    prefill(model, tokens, model.make_cache(), media=media, chunk_size=3)
    assert seen == [2, 1, 1]


@pytest.fixture
def encoded(monkeypatch):
    """How many pixel rows each medium had that was encoded, in order."""
    encode, seen = VisionTower.encode, []

    def watched(self, pixels, grids):
        seen.extend(len(rows) for rows in pixels)
        return encode(self, pixels, grids)

    monkeypatch.setattr(VisionTower, "encode", watched)
    return seen


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_the_rest_of_a_prompt_after_any_cut(model, encoded, chunk_size):
    tokens, media = prompt_of(2, ONE, 1, FILM, 2, TALL, 1)
    ends = [2 + 6, 2 + 6 + 1 + 6 + 1 + 6, len(tokens) - 1]  # where the features of each medium end
    whole = np.array(model(mx.array([tokens]), None, media))[0]
    for cut in range(1, len(tokens)):
        cache = model.make_cache()
        model(mx.array([tokens[:cut]]), cache, model.see(mx.array([tokens]), media)[:cut])
        encoded.clear()
        found = prefill(model, tokens, cache, media=media, covered=cut, chunk_size=chunk_size)
        np.testing.assert_allclose(np.array(found)[0], whole[-1], atol=1e-3)
        assert encoded == [len(medium.pixels) for medium, end in zip(media, ends, strict=True) if end > cut]
        following = np.array(model(mx.array([[5]]), cache))[0, 0]
        alone = np.array(model(mx.array([tokens + [5]]), None, media))[0, -1]
        np.testing.assert_allclose(following, alone, atol=1e-3)


def test_the_rest_of_a_padded_batch(model):
    prompts = [prompt_of(2, ONE, 3), prompt_of(1), prompt_of(1, FILM, TALL, 2)]
    width = max(len(tokens) for tokens, _ in prompts)
    padding = [width - len(tokens) for tokens, _ in prompts]
    padded = mx.array([[IMAGE] * pad + tokens for pad, (tokens, _) in zip(padding, prompts, strict=True)])
    rows = [media for _, media in prompts]
    whole = np.array(prefill(model, padded, model.make_cache(3, padding), media=rows))
    for cut in (1, padding[0] + 1, padding[0] + 4, width - 2):
        cache = model.make_cache(3, padding)
        model(padded[:, :cut], cache, model.see(padded, rows, cache)[:cut])
        found = np.array(prefill(model, padded, cache, media=rows, covered=cut))
        np.testing.assert_allclose(found, whole, atol=1e-3)


def test_a_cache_that_holds_something_else_is_refused(model, encoded):
    tokens, media = prompt_of(2, ONE, 3)
    ids = mx.array([tokens])
    cache = model.make_cache()
    prefill(model, tokens, cache, media=media)
    encoded.clear()
    for covered in (-1, len(tokens) - 1, len(tokens) + 1):
        with pytest.raises(ValueError, match=f"covered is {covered}, but the cache holds {len(tokens)} tokens"):
            model.see(ids, media, cache, covered=covered)
    with pytest.raises(ValueError, match="the cache holds 0 tokens"):
        model.see(ids, media, covered=3)
    square = some_media("image", 4, 4)  # its 4 placeholders take 2 positions, the 6 in the cache take 3
    other, _ = prompt_of(2, square, 7)
    with pytest.raises(ValueError, match="at other positions"):
        model.see(mx.array([other]), [square], cache, covered=len(tokens))
    assert encoded == []


def test_a_store_that_keeps_nothing_gives_the_same_features(model, encoded):
    wanted = model.encode_media([ONE, TALL, ONE])
    store = FeatureStore(most_bytes=0)
    encoded.clear()
    for features, known in zip(wanted, model.encode_media([ONE, TALL, ONE], known=store), strict=True):
        np.testing.assert_array_equal(np.array(features), np.array(known))
    assert encoded == [len(ONE.pixels), len(TALL.pixels)] and not store
    store = FeatureStore(most_bytes=wanted[0].nbytes)
    model.encode_media([ONE], known=store)
    encoded.clear()
    features = model.encode_media([OTHER, ONE, TALL], known=store)  # ONE is gone before it is asked for again
    assert encoded == [len(OTHER.pixels), len(TALL.pixels)]
    np.testing.assert_array_equal(np.array(features[1]), np.array(wanted[0]))


def test_a_model_without_a_tower_refuses():
    model, _ = tiny_model("dense", **LAYERS)
    tokens, media = prompt_of(2, ONE, 2)
    cache = model.make_cache()
    with pytest.raises(PromptError, match="no vision weights"):
        prefill(model, tokens, cache, media=media)
    assert cache.offset == 0


def test_what_does_not_fit_is_refused_before_anything_is_computed(model, monkeypatch):
    def unexpected(self, pixels, grids):
        raise AssertionError("encoded")

    monkeypatch.setattr(VisionTower, "encode", unexpected)
    tokens, media = prompt_of(2, ONE, 2)
    for wrong in ([ONE, ONE], [TALL], [FILM], [ONE, FILM]):
        with pytest.raises(PromptError, match="placeholders"):
            model(mx.array([tokens]), None, wrong)
    with pytest.raises(ValueError, match="one list a row"):
        model(mx.array([tokens, tokens]), None, media)


def test_a_sight_of_other_tokens_is_refused(model):
    tokens, media = prompt_of(2, ONE, 2)
    sight = model.see(mx.array([tokens]), media)
    with pytest.raises(ValueError, match=r"placed in \[1, 10\] tokens, these are \[1, 4\]"):
        model(mx.array([tokens[:4]]), None, sight)
