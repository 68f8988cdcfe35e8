"""Answers to prompts with pictures: the tokens of a recomputing loop, also batched, cut, cancelled, and kept apart."""

import operator
from functools import partial

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.errors import PromptError
from mlx_qwen35.generation import generate_batch, prefill, stream_generate
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.vision.features import FeatureStore
from mlx_qwen35.vision.tower import VisionTower
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.talkers import Endless
from tests.tiny_model import tiny_model

LAYERS = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
ONE = some_media("image", 4, 6, seed=1)
OTHER = some_media("image", 4, 6, seed=4)
TALL = some_media("image", 8, 4, seed=2)
FILM = some_media("video", 2, 4, 6, seed=3)
COUNT = 6


@pytest.fixture(scope="module")
def model():
    return seeing_model(**LAYERS)[0]


def asked(*parts) -> Prompt:
    tokens, media = prompt_of(*parts)
    return Prompt(tokens, None, False, tuple(media))


def answer(model, prompt, **options):
    options = {"sampling": Sampling(), "max_tokens": COUNT} | options
    return [part.token for part in stream_generate(model, Endless(), prompt, **options) if part.token is not None]


def recomputed(model, prompt: Prompt, count: int = COUNT) -> list[int]:
    tokens = list(prompt.tokens)
    for _ in range(count):
        tokens.append(model(mx.array([tokens]), None, prompt.media)[0, -1].argmax().item())
    return tokens[-count:]


def assert_covers(model, cache, prompt: Prompt, tokens: list[int]) -> None:
    """The cache holds exactly the prompt and the tokens, and knows at which position to go on."""
    more = [5, 17, 33]
    assert cache.offset == len(prompt.tokens) + len(tokens)
    whole = np.array(model(mx.array([[*prompt.tokens, *tokens, *more]]), None, prompt.media))[0, -len(more) :]
    np.testing.assert_allclose(np.array(model(mx.array([more]), cache))[0], whole, atol=1e-3)


@pytest.mark.parametrize("chunk_size", [1, 4, 100])
@pytest.mark.parametrize("parts", [(3, ONE, 2), (2, FILM, 1, TALL, 1), (ONE, OTHER, FILM, 1)])
def test_greedy_tokens_are_those_of_a_recomputing_loop(model, parts, chunk_size):
    prompt, cache = asked(*parts), model.make_cache()
    tokens = answer(model, prompt, chunk_size=chunk_size, cache=cache)
    assert tokens == recomputed(model, prompt)
    assert_covers(model, cache, prompt, tokens)


def test_images_and_videos_may_be_given_beside_the_ids(model):
    prompt = asked(2, ONE, 1, OTHER, 2, FILM, 3)
    given = answer(model, prompt.tokens, images=[ONE, OTHER], videos=[FILM])
    assert given == recomputed(model, prompt)
    with pytest.raises(PromptError, match="a Prompt has its images"):
        stream_generate(model, Endless(), prompt, images=[ONE])


def test_equal_sizes_swapped_are_two_answers_with_one_store(model, encoded):
    store, answers = FeatureStore(), []
    for medium in (ONE, OTHER, ONE, OTHER):
        prompt = asked(3, medium, 4)
        answers.append(answer(model, prompt, features=store))
        assert answers[-1] == recomputed(model, prompt)
    assert answers[0] == answers[2] != answers[1] == answers[3]
    encoded.clear()
    assert answer(model, asked(3, some_media("image", 4, 6, seed=4), 4), features=store) == answers[1]
    assert encoded == [] and store.keys() == {ONE.key, OTHER.key}


def test_a_longer_prompt_goes_on_and_encodes_only_what_is_new(model, encoded):
    cache, first = model.make_cache(), asked(2, ONE, 3)
    said = answer(model, first, cache=cache)
    second = asked(1, TALL, 2)
    whole = Prompt([*first.tokens, *said, *second.tokens], None, False, (ONE, TALL))
    encoded.clear()
    parts = list(
        stream_generate(
            model, Endless(), whole, cache=cache, covered=cache.offset, sampling=Sampling(), max_tokens=COUNT
        )
    )
    assert encoded == [TALL.grid]
    assert (parts[0].cached_tokens, parts[0].prompt_tokens) == (len(first.tokens) + COUNT, len(second.tokens))
    tokens = [part.token for part in parts]
    assert tokens == recomputed(model, whole)
    assert_covers(model, cache, whole, tokens)


@pytest.mark.parametrize("keep", [FeatureStore, lambda: None])
def test_a_prefill_cancelled_anywhere_goes_on_from_there(model, encoded, keep):
    prompt = asked(2, ONE, 1, FILM, 2)
    wanted = recomputed(model, prompt)
    for end in range(1, len(prompt.tokens)):
        cache, features, done = model.make_cache(), keep(), []
        options = {"cache": cache, "features": features, "chunk_size": 1}
        cancel = partial(operator.contains, done, end)
        stopped = answer(
            model, prompt, on_progress=lambda at, total, done=done: done.append(at), cancel=cancel, **options
        )
        assert stopped == [] and cache.offset == end
        encoded.clear()
        assert answer(model, prompt, covered=end, **options) == wanted
        assert len(encoded) == (0 if features is not None else (end < 2 + 6) + (end < 2 + 6 + 1 + 6 + 1 + 6))
        assert_covers(model, cache, prompt, wanted)


def test_interrupted_while_pictures_are_encoded_nothing_has_happened(model, monkeypatch):
    cache, store, encode = model.make_cache(), FeatureStore(), VisionTower.encode

    def failing(self, pixels, grids):
        encode(self, pixels, grids)
        raise KeyboardInterrupt

    prompt = asked(2, ONE, 3)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(VisionTower, "encode", failing)
        answer(model, prompt, cache=cache, features=store)
    assert cache.offset == 0 and not store
    assert answer(model, prompt, cache=cache, features=store) == recomputed(model, prompt)


def test_cancelled_before_it_began_nothing_is_encoded(model, encoded):
    assert answer(model, asked(2, ONE, 3), cancel=lambda: True) == []
    assert encoded == []


@pytest.mark.parametrize("chunk_size", [3, 100])
def test_a_batch_is_its_rows_alone(model, chunk_size):
    prompts = [asked(2, ONE, 3), asked(4), asked(1, FILM, TALL, 2), asked(2, OTHER, 3)]
    answers = generate_batch(model, Endless(), prompts, max_tokens=COUNT, sampling=Sampling(), chunk_size=chunk_size)
    for prompt, found in zip(prompts, answers, strict=True):
        assert list(found.tokens) == recomputed(model, prompt)
        assert found.prompt_tokens == len(prompt.tokens)
    ids = [prompt.tokens for prompt in prompts]
    images, videos = [[ONE], [], [TALL], [OTHER]], [[], [], [FILM], []]
    again = generate_batch(model, Endless(), ids, images=images, videos=videos, max_tokens=COUNT, sampling=Sampling())
    assert [row.tokens for row in again] == [row.tokens for row in answers]


def test_what_cannot_be_seen_is_refused_at_the_call(model, encoded):
    blind, _ = tiny_model("dense", **LAYERS)
    prompt = asked(2, ONE, 3)
    wrong = Prompt(prompt.tokens, None, False, (TALL,))
    for refuse in (
        lambda one, of: stream_generate(of, Endless(), one),
        lambda one, of: generate_batch(of, Endless(), [[5], one]),
    ):
        with pytest.raises(PromptError, match="no vision weights"):
            refuse(prompt, blind)
        with pytest.raises(PromptError, match="has 6 image placeholders"):
            refuse(wrong, model)
    for given in ({"images": [[ONE]]}, {"videos": [[], [], []]}):
        with pytest.raises(PromptError, match="for 2 prompts; give one list a prompt"):
            generate_batch(model, Endless(), [prompt.tokens, [5]], **given)
    assert encoded == []


def test_a_cache_that_does_not_hold_what_is_covered_is_refused_at_the_call(model):
    prompt, cache = asked(2, ONE, 3), model.make_cache()
    prefill(model, prompt.tokens, cache, media=prompt.media)
    for covered in (-1, 3, len(prompt.tokens)):
        with pytest.raises(ValueError, match=f"covered is {covered}, the cache holds 11 tokens and the whole .* 11"):
            stream_generate(model, Endless(), prompt, cache=cache, covered=covered)
    square = some_media("image", 4, 4)
    with pytest.raises(ValueError, match="at other positions"):
        stream_generate(model, Endless(), asked(2, square, 9), cache=cache, covered=11)
