"""The timeline of a chat: where it goes on, that pictures count and not their size, and what an interrupt leaves."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.generation import prefill, stream_generate
from mlx_qwen35.library import load
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.timeline import Timeline
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.speakers import checkpoint  # noqa: F401

ONE = some_media("image", 4, 6, seed=1)
OTHER = some_media("image", 4, 6, seed=4)
TALL = some_media("image", 8, 4, seed=2)
FILM = some_media("video", 2, 4, 6, seed=3)


def test_a_kept_timeline_answers_as_a_new_one(checkpoint):  # noqa: F811
    model, processor = load(checkpoint)
    timeline, messages = Timeline(model), []
    for question in ("hello", "the other", "and more"):
        messages.append({"role": "user", "content": question})
        prompt = processor.prompt(messages)
        covered = timeline.go_on(prompt)
        assert timeline.cache.offset == covered < len(prompt.tokens)
        assert (covered > 0) == (len(messages) > 1)
        turn = len(prompt.tokens) - prompt.tokens[::-1].index(processor.tokenizer.token_id("<|im_start|>")) - 1
        options = {"max_tokens": 6, "sampling": Sampling()}

        def on_progress(done, total, turn=turn, covered=covered):
            if covered + done == turn:
                timeline.mark()

        kept = stream_generate(
            model,
            processor,
            prompt,
            cache=timeline.cache,
            covered=covered,
            boundaries=[turn - covered],
            on_progress=on_progress,
            **options,
        )
        kept = [part.token for part in kept]
        assert kept == [part.token for part in stream_generate(model, processor, prompt, **options)]
        timeline.settle([*prompt.tokens, *kept])
        messages.append({"role": "assistant", "content": processor.decode(kept)})


@pytest.fixture(scope="module")
def model():
    return seeing_model()[0]


def asked(*parts) -> Prompt:
    tokens, media = prompt_of(*parts)
    return Prompt(tokens, None, False, tuple(media))


def text(*tokens: int) -> Prompt:
    return Prompt(list(tokens), None, False)


def compute(timeline: Timeline, prompt: Prompt, stop: int | None = None, *, mark: int | None = None) -> int:
    """A turn that is cancelled after `stop` tokens of the prompt; -> how many were kept from before."""
    covered = timeline.go_on(prompt)
    assert covered == timeline.cache.offset == len(timeline.tokens)
    assert timeline.tokens == prompt.tokens[:covered]
    at = covered
    for end in sorted({covered, mark or covered, len(prompt.tokens) if stop is None else stop}):
        if end > at:
            sight = (
                timeline._model.see(mx.array([prompt.tokens]), prompt.media, timeline.cache, covered=at)
                if prompt.media
                else ()
            )
            timeline._model(mx.array([prompt.tokens[at:end]]), timeline.cache, sight[: end - at])
            at = end
        if at == mark:
            timeline.mark()
    timeline.settle(prompt.tokens)
    return covered


def assert_right(timeline: Timeline, prompt: Prompt) -> None:
    """Going on with the prompt gives what all of it gives."""
    covered = timeline.go_on(prompt)
    found = prefill(timeline._model, prompt.tokens, timeline.cache, media=prompt.media, covered=covered)
    whole = timeline._model(mx.array([prompt.tokens]), None, prompt.media)[:, -1]
    np.testing.assert_allclose(np.array(found), np.array(whole), atol=1e-3)


def test_where_it_goes_on(model):
    timeline = Timeline(model)
    assert compute(timeline, text(1, 2, 3, 4, 5), 4, mark=2) == 0
    assert timeline.tokens == [1, 2, 3, 4]
    assert timeline.go_on(text(1, 2, 3, 4, 5)) == 4  # from the end
    assert compute(timeline, text(1, 2, 9)) == 2  # from the mark
    assert compute(timeline, text(1, 7, 3), mark=2) == 0  # another beginning
    assert timeline.go_on(text(1, 7)) == 0  # nothing would be left to compute
    assert timeline.tokens == [] and timeline.cache.offset == 0


def test_another_picture_of_the_same_size_is_another_prompt(model):
    timeline = Timeline(model)
    compute(timeline, asked(3, ONE, 4), mark=2)
    assert timeline.go_on(asked(3, some_media("image", 4, 6, seed=1), 4, 2)) == 13  # equal, and read again
    for swapped in (OTHER, ONE, OTHER):
        prompt = asked(3, swapped, 4)
        assert compute(timeline, asked(3, swapped, 4, 1)) == 2  # the mark
        assert_right(timeline, Prompt([*prompt.tokens, 5, 6], None, False, prompt.media))


def test_of_several_pictures_the_first_other_one_counts(model):
    prompt = asked(1, ONE, 1, FILM, 1, TALL, 1)
    film, tall = 1 + 6 + 1, 1 + 6 + 1 + 6 + 1 + 6 + 1  # where their placeholders begin
    for media, marks in {
        (ONE, FILM, some_media("image", 8, 4, seed=7)): {2: 2, film: film, tall: tall, tall + 1: 0},
        (ONE, some_media("video", 2, 4, 6, seed=7), TALL): {2: 2, film: film, film + 1: 0, tall: 0},
        (OTHER, FILM, TALL): {1: 1, 2: 0},
    }.items():
        for mark, kept in marks.items():
            timeline, other = Timeline(model), Prompt(prompt.tokens, None, False, media)
            compute(timeline, prompt, mark=mark)
            assert compute(timeline, other, mark=mark) == kept
            assert_right(timeline, Prompt([*other.tokens, 5], None, False, media))


def test_media_of_ids_are_not_in_the_order_of_the_tokens(model):
    tokens, _ = prompt_of(1, FILM, 1, ONE, 1)
    first, timeline = Prompt(tokens, None, False, (ONE, FILM)), Timeline(model)
    compute(timeline, first, mark=1 + 13 + 1)
    assert timeline.go_on(Prompt([*tokens, 5], None, False, (FILM, ONE))) == len(tokens)
    timeline.settle(tokens)
    assert compute(timeline, Prompt(tokens, None, False, (OTHER, FILM))) == 15
    compute(timeline, first, mark=15)
    film = some_media("video", 2, 4, 6, seed=7)
    assert compute(timeline, Prompt(tokens, None, False, (OTHER, film))) == 0


def test_placeholders_without_a_picture_are_other_tokens(model):
    timeline, prompt = Timeline(model), asked(3, ONE, 4)
    compute(timeline, prompt, mark=1)
    assert compute(timeline, text(*prompt.tokens, 1)) == 1
    assert compute(timeline, Prompt([*prompt.tokens, 1], None, False, prompt.media)) == 1
    assert compute(timeline, asked(3), mark=1) == 1


def test_one_that_was_cancelled_inside_a_picture(model):
    prompt, again = asked(2, ONE, 1, TALL, 2), asked(2, OTHER, 1, TALL, 2)
    for stop in range(1, len(prompt.tokens)):
        timeline = Timeline(model)
        compute(timeline, prompt, stop, mark=1)
        assert timeline.go_on(prompt) == stop
        assert_right(timeline, prompt)
        timeline = Timeline(model)
        compute(timeline, prompt, stop, mark=1)
        assert timeline.go_on(again) == (stop if stop <= 2 else 1)
        assert_right(timeline, again)


@pytest.mark.parametrize("place", ["restore", "make_cache", "settle"])
def test_an_interrupt_anywhere_leaves_nothing_wrong(model, monkeypatch, place):
    timeline, prompt, other = Timeline(model), asked(3, ONE, 4), asked(3, OTHER, 5)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    compute(timeline, prompt, mark=None if place == "make_cache" else 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        where = {"restore": Cache, "make_cache": type(model), "settle": Timeline}[place]
        patch.setattr(where, place, interrupted)
        compute(timeline, other, mark=2)
    for next_prompt in (prompt, other, asked(3, OTHER, 6)):
        assert_right(timeline, next_prompt)
        timeline.settle(next_prompt.tokens)
