"""Drafts in a session: what it covers, its marks and its branches are right wherever an answer ended."""

import gc
import weakref

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import read_header
from mlx_qwen35.errors import SessionError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.session import Session, file, load_session
from tests.drafted import always, guessed, near, random_head, with_head
from tests.talkers import PROMPT, Endless, assert_covers, random_model, recomputed

MODEL, DRAFTER = random_model("dense"), near("dense", 0.02)
HEADED, HEAD, _ = with_head("dense")
HEADED.take_mtp(HEAD)


def talk(session, prompt, count, **options):
    """The first `count` tokens of an answer, which is then closed."""
    drafter = DRAFTER if session.model is MODEL else None
    options = {"max_tokens": 30, "draft_model": drafter, "chunk_size": 4, "lookup": False} | options
    options |= {"sampling": Sampling()}
    stream = stream_generate(session.model, Endless(), prompt, session=session, **options)
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


MORE = 50, 51  # what goes on after a place in the past


def begun(model, drafted=True):
    """A session with marks every few tokens, and what was said in it; drafted: the last answer was."""
    session = Session(model, snapshot_bytes=1 << 20)
    session.marks._step = 2
    said = list(PROMPT)
    for number, more in enumerate(([4, 61], [7, 9, 9], [12])):
        undrafted = {} if drafted or number < 2 else {"mtp": False, "draft_model": None}
        with guessed(3):
            said = [*said, *talk(session, said, 8, **undrafted), *more]
    return session, said


def agree(one, twin, prompt):
    """Two sessions say and guess the same."""
    wanted, found = recomputed(one.model, prompt, 7), []
    for session in (one, twin):
        with guessed(3) as guesses:
            assert talk(session, prompt, 7) == wanted
        assert session.cache.draft.cache is session.cache
        found.append(guesses)
    assert found[0] == found[1] and len(found[0]) >= 6


@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("model", [HEADED, MODEL], ids=["head", "draft model"])
def test_a_branch_and_its_session_draft_as_if_each_were_alone(model, drafted):
    session, said = begun(model, drafted)
    branch = session.branch()
    pairs = [(each, begun(model, drafted)[0]) for each in (session, branch)]
    turns = [(0, said), (1, [*said, 6, 7]), (0, [*said, 5, 8]), (1, [*said[:20], *MORE]), (0, said), (1, said)]
    for which, prompt in [*turns, (0, [*said[:14], *MORE]), (1, [*said[:10], *MORE]), (0, [*said[:20], 3])]:
        agree(*pairs[which], prompt)
    third = branch.branch()
    del branch, pairs[1:]
    agree(third, begun(model)[0], [*said[:9], *MORE])


@pytest.mark.parametrize("drafted", [True, False])
@pytest.mark.parametrize("branched", [False, True])
def test_a_loaded_session_drafts_as_the_saved_one(tmp_path, branched, drafted):
    for place in (24, 14, 2):  # each loaded anew, with all its marks
        session, said = begun(HEADED, drafted)
        if branched:
            session.branch()
        session.save(tmp_path / "a")
        loaded = load_session(tmp_path / "a", HEADED)
        loaded.save(tmp_path / "b")
        if drafted:  # else the drafter has more than its last mark says
            assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
        agree(loaded, session, [*said[:place], *MORE])
        agree(loaded, session, said)


def test_who_has_another_head_or_none_loads_the_rest(tmp_path):
    session, said = begun(HEADED)
    session.save(tmp_path / "a")
    bare, other = with_head("dense")[0], with_head("dense")[0]
    other.take_mtp(random_head(with_head("dense")[1]))
    for model in (bare, other):
        loaded = load_session(tmp_path / "a", model)
        assert loaded.cache.draft is None and all(mark.snapshot.draft is None for mark in loaded.marks)
        loaded.save(tmp_path / "b")
        again = load_session(tmp_path / "b", HEADED)
        assert again.cache.draft is None
        for each in (loaded, again):
            assert talk(each, said, 7) == recomputed(HEADED, said, 7)
    begun(MODEL)[0].save(tmp_path / "c")  # a draft model is in no file
    assert load_session(tmp_path / "c", MODEL).cache.draft is None


def test_a_file_of_before_drafts_were_saved_loads(tmp_path, monkeypatch):
    session, said = begun(HEADED)
    write = file.write

    def older(path, description, arrays):
        del description["drafts"]
        write(path, description, {name: array for name, array in arrays.items() if not name.startswith("draft")})

    monkeypatch.setattr(file, "write", older)
    session.save(tmp_path / "a")
    loaded = load_session(tmp_path / "a", HEADED)
    assert loaded.cache.draft is None and talk(loaded, said, 7) == recomputed(HEADED, said, 7)


def test_damage_to_what_the_drafter_knows_is_refused(tmp_path):
    begun(HEADED)[0].save(tmp_path / "a")
    whole = (tmp_path / "a").read_bytes()
    entries = {name: entry for name, entry in read_header(tmp_path / "a")[0].items() if name.startswith("draft")}
    assert {name.rpartition(".")[2] for name in entries} == {"keys", "values", "tokens", "hidden", "positions"}
    for entry in entries.values():
        damaged = bytearray(whole)
        damaged[entry.offset + 1] ^= 4
        (tmp_path / "a").write_bytes(damaged)
        with pytest.raises(SessionError, match="damaged"):
            load_session(tmp_path / "a", HEADED)


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
