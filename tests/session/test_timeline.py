"""A session: where it goes on, that pictures count and not their size, and what an interrupt leaves."""

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.cache import Cache
from mlx_qwen35.errors import PromptError
from mlx_qwen35.generation import prefill, stream_generate
from mlx_qwen35.library import load
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from tests.seeing_model import prompt_of, seeing_model, some_media
from tests.speakers import checkpoint  # noqa: F401

ONE = some_media("image", 4, 6, seed=1)
OTHER = some_media("image", 4, 6, seed=4)
TALL = some_media("image", 8, 4, seed=2)
FILM = some_media("video", 2, 4, 6, seed=3)


def test_a_session_answers_as_no_session(checkpoint):  # noqa: F811
    model, processor = load(checkpoint)
    session, messages = Session(model), []
    for question in ("hello", "the other", "and more"):
        messages.append({"role": "user", "content": question})
        prompt = processor.prompt(messages)
        options = {"max_tokens": 6, "sampling": Sampling()}
        kept = list(stream_generate(model, processor, prompt, session=session, **options))
        tokens = [part.token for part in kept]
        assert tokens == [part.token for part in stream_generate(model, processor, prompt, **options)]
        assert kept[-1].cached_tokens + kept[-1].prompt_tokens == len(prompt.tokens)
        assert (kept[-1].cached_tokens > 0) == (len(messages) > 1)
        assert session.tokens == [*prompt.tokens, *tokens] and session.cache.offset == len(session.tokens)
        messages.append({"role": "assistant", "content": processor.decode(tokens)})
    with pytest.raises(ValueError, match="give it alone"):
        stream_generate(model, processor, prompt, session=session, cache=model.make_cache())


def test_a_prompt_that_is_refused_leaves_the_session_as_it_was(checkpoint):  # noqa: F811
    model, processor = load(checkpoint)
    session = Session(model)
    list(stream_generate(model, processor, "hello", session=session, max_tokens=3, sampling=Sampling()))
    before = list(session.tokens)
    with pytest.raises(PromptError, match="context holds 10 "):
        stream_generate(model, processor, "the other " * 5, session=session, context_length=10)
    assert session.tokens == before and session.cache.offset == len(before)


@pytest.fixture(scope="module")
def model():
    return seeing_model()[0]


def asked(*parts) -> Prompt:
    tokens, media = prompt_of(*parts)
    return Prompt(tokens, None, False, tuple(media))


def text(*tokens: int) -> Prompt:
    return Prompt(list(tokens), None, False)


def compute(session: Session, prompt: Prompt, stop: int | None = None, *, mark: int | None = None) -> int:
    """A turn that is cancelled after `stop` tokens of the prompt, with a snapshot at `mark`; -> how many were kept."""
    prompt = replace(prompt, turns=() if mark is None else (0, mark))
    covered = at = session.go_on(prompt)
    assert covered == session.cache.offset == len(session.tokens)
    assert session.tokens == prompt.tokens[:covered]
    stop = len(prompt.tokens) if stop is None else stop
    for end in sorted({*(place for place in session.meetings if place == mark and place < stop), stop}):
        if end > at:
            see = session.model.see
            sight = see(mx.array([prompt.tokens]), prompt.media, session.cache, covered=at) if prompt.media else ()
            session.model(mx.array([prompt.tokens[at:end]]), session.cache, sight[: end - at])
            at = end
            if end == mark:
                session.reached(1)
    session.settle(prompt.tokens)
    return covered


def assert_right(session: Session, prompt: Prompt) -> None:
    """Going on with the prompt gives what all of it gives."""
    covered = session.go_on(prompt)
    found = prefill(session.model, prompt.tokens, session.cache, media=prompt.media, covered=covered)
    whole = session.model(mx.array([prompt.tokens]), None, prompt.media)[:, -1]
    np.testing.assert_allclose(np.array(found), np.array(whole), atol=1e-3)


def test_where_it_goes_on(model):
    session = Session(model)
    assert compute(session, text(1, 2, 3, 4, 5), 4, mark=2) == 0
    assert session.tokens == [1, 2, 3, 4]
    assert session.go_on(text(1, 2, 3, 4, 5)) == 4  # from the end
    assert compute(session, text(1, 2, 9)) == 2  # from the mark
    assert compute(session, text(1, 7, 3), mark=2) == 0  # another beginning
    assert session.go_on(text(1, 7)) == 0  # nothing would be left to compute
    assert session.tokens == [] and session.cache.offset == 0


def test_another_picture_of_the_same_size_is_another_prompt(model):
    session = Session(model)
    compute(session, asked(3, ONE, 4), mark=2)
    assert session.go_on(asked(3, some_media("image", 4, 6, seed=1), 4, 2)) == 13  # equal, and read again
    for swapped in (OTHER, ONE, OTHER):
        prompt = asked(3, swapped, 4)
        assert compute(session, asked(3, swapped, 4, 1)) == 2  # the mark
        assert_right(session, Prompt([*prompt.tokens, 5, 6], None, False, prompt.media))


def test_of_several_pictures_the_first_other_one_counts(model):
    prompt = asked(1, ONE, 1, FILM, 1, TALL, 1)
    film, tall = 1 + 6 + 1, 1 + 6 + 1 + 6 + 1 + 6 + 1  # where their placeholders begin
    for media, marks in {
        (ONE, FILM, some_media("image", 8, 4, seed=7)): {2: 2, film: film, tall: tall, tall + 1: 0},
        (ONE, some_media("video", 2, 4, 6, seed=7), TALL): {2: 2, film: film, film + 1: 0, tall: 0},
        (OTHER, FILM, TALL): {1: 1, 2: 0},
    }.items():
        for mark, kept in marks.items():
            session, other = Session(model), Prompt(prompt.tokens, None, False, media)
            compute(session, prompt, mark=mark)
            assert compute(session, other, mark=mark) == kept
            assert_right(session, Prompt([*other.tokens, 5], None, False, media))


def test_media_of_ids_are_not_in_the_order_of_the_tokens(model):
    tokens, _ = prompt_of(1, FILM, 1, ONE, 1)
    first, session = Prompt(tokens, None, False, (ONE, FILM)), Session(model)
    compute(session, first, mark=1 + 13 + 1)
    assert session.go_on(Prompt([*tokens, 5], None, False, (FILM, ONE))) == len(tokens)
    session.settle(tokens)
    assert compute(session, Prompt(tokens, None, False, (OTHER, FILM))) == 15
    compute(session, first, mark=15)
    film = some_media("video", 2, 4, 6, seed=7)
    assert compute(session, Prompt(tokens, None, False, (OTHER, film))) == 0


def test_placeholders_without_a_picture_are_other_tokens(model):
    session, prompt = Session(model), asked(3, ONE, 4)
    compute(session, prompt, mark=1)
    assert compute(session, text(*prompt.tokens, 1)) == 1
    assert compute(session, Prompt([*prompt.tokens, 1], None, False, prompt.media)) == 1
    assert compute(session, asked(3), mark=1) == 1


def test_one_that_was_cancelled_inside_a_picture(model):
    prompt, again = asked(2, ONE, 1, TALL, 2), asked(2, OTHER, 1, TALL, 2)
    for stop in range(1, len(prompt.tokens)):
        session = Session(model)
        compute(session, prompt, stop, mark=1)
        assert session.go_on(prompt) == stop
        assert_right(session, prompt)
        session = Session(model)
        compute(session, prompt, stop, mark=1)
        assert session.go_on(again) == (stop if stop <= 2 else 1)
        assert_right(session, again)


@pytest.mark.parametrize("place", ["restore", "make_cache", "settle"])
def test_an_interrupt_anywhere_leaves_nothing_wrong(model, monkeypatch, place):
    session, prompt, other = Session(model), asked(3, ONE, 4), asked(3, OTHER, 5)

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    compute(session, prompt, mark=None if place == "make_cache" else 2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        where = {"restore": Cache, "make_cache": type(model), "settle": Session}[place]
        patch.setattr(where, place, interrupted)
        compute(session, other, mark=2)
    for next_prompt in (prompt, other, asked(3, OTHER, 6)):
        assert_right(session, next_prompt)
        session.settle(next_prompt.tokens)
