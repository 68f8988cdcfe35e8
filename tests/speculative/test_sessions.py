"""Drafts in a session: what it covers, its marks and its branches are right wherever an answer ended."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.generation import stream_generate
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session
from tests.drafted import always, near
from tests.talkers import PROMPT, Endless, assert_covers, random_model, recomputed

MODEL, DRAFTER = random_model("dense"), near("dense", 0.02)


def talk(session, prompt, count, **options):
    """The first `count` tokens of an answer, which is then closed."""
    options = {"sampling": Sampling(), "max_tokens": 30, "draft_model": DRAFTER, "chunk_size": 4} | options
    stream = stream_generate(MODEL, Endless(), prompt, session=session, **options)
    tokens = [next(stream).token for _ in range(count)]
    stream.close()
    return tokens


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 30])
def test_an_answer_left_anywhere_and_gone_on_from(monkeypatch, count):
    always(monkeypatch, 3)
    session = Session(MODEL, snapshot_bytes=1 << 20)
    session.marks._step = 2  # marks as close as they come
    said = list(PROMPT)
    for more in ([4], [60, 61], [7]):
        new = talk(session, said, count)
        assert new == recomputed(MODEL, said, count)
        assert session.cache.offset == len(session.tokens) == len(said) + count
        for mark in session.marks:
            assert mark.offset <= len(session.tokens)
        said = [*said, *new, *more]
    # another turn of events from the middle: what the marks hold is what they stand for
    other = [*said[: len(PROMPT) + count], 50, 51, 52]
    assert talk(session, other, 4) == recomputed(MODEL, other, 4)
    assert_covers(MODEL, session.cache, session.tokens)


def test_a_branch_drafts_for_itself(monkeypatch):
    always(monkeypatch, 2)
    session = Session(MODEL)
    said = [*PROMPT, *talk(session, PROMPT, 6)]
    branch = session.branch()
    for each, prompt in ((session, [*said, 5]), (branch, [*said, 6, 7]), (session, [*said, 5, 8]), (branch, said[:9])):
        assert talk(each, prompt, 5) == recomputed(MODEL, prompt, 5)
        assert each.cache.draft.cache is each.cache


def test_what_is_forgotten_is_gone(monkeypatch):
    always(monkeypatch, 2)
    session = Session(MODEL)
    talk(session, PROMPT, 5)
    gc.collect()
    gc.disable()
    try:
        cache, drafter = weakref.ref(session.cache), weakref.ref(session.cache.draft)
        session.forget()
        assert cache() is None and drafter() is None
    finally:
        gc.enable()


def test_bytes_count_what_the_drafter_holds(monkeypatch):
    always(monkeypatch, 2)
    session = Session(MODEL)
    talk(session, PROMPT, 5)
    with_drafter = session.nbytes
    own = sum(np.prod(a.shape) * a.dtype.size for a in session.cache.draft.arrays())
    session.cache.draft = None
    assert with_drafter == session.nbytes + own > session.nbytes
    mx.clear_cache()
