"""A session makes one answer at a time: what would disturb it is refused, and neither it nor the session is harmed."""

import sys
import threading

import pytest

from mlx_qwen35.errors import SessionError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.session import Session, Sessions, load_session
from tests.drafted import always, near
from tests.talkers import PROMPT, Endless, assert_covers, greedy, random_model, recomputed

MODEL, DRAFTER = random_model("dense"), near("dense", 0.02)
DISTURBANCES = {
    "begin another": lambda session, path: next(greedy(MODEL, [*PROMPT, 9, 9], session=session)),
    "branch it": lambda session, path: session.branch(),
    "save it": lambda session, path: session.save(path),
}


def begun(model=MODEL) -> tuple[Session, list[int]]:
    """A session with a mark to fall back to, and a prompt that goes on."""
    session = Session(model)
    session.marks._step = 2
    said = [part.token for part in greedy(model, session=session, chunk_size=3)]
    return session, [*PROMPT, *said[:4], 60, 61]


@pytest.mark.parametrize("draft_model", [None, DRAFTER], ids=["plain", "drafts"])
@pytest.mark.parametrize("then", DISTURBANCES)
def test_what_would_disturb_an_answer_is_refused(monkeypatch, tmp_path, then, draft_model):
    always(monkeypatch, 3)
    session, prompt = begun()
    wanted = recomputed(MODEL, prompt, 12)
    stream, found = greedy(MODEL, prompt, session=session, draft_model=draft_model), []
    for part in stream:
        found.append(part.token)
        if len(found) == 5:
            with pytest.raises(SessionError, match=f"stream.close\\(\\)\\), then {then}"):
                DISTURBANCES[then](session, tmp_path / "a")
    assert found == wanted and session.tokens == [*prompt, *wanted]
    assert_covers(MODEL, session.cache, session.tokens)


@pytest.mark.parametrize("then", DISTURBANCES)
def test_a_stream_that_is_closed_gives_the_session_back(tmp_path, then):
    session, prompt = begun()
    stream = greedy(MODEL, prompt, session=session)
    found = [next(stream).token for _ in range(3)]
    assert session.in_use
    stream.close()
    assert not session.in_use and session.tokens == [*prompt, *found]
    DISTURBANCES[then](session, tmp_path / "a")


def test_errors_and_what_was_never_begun_give_it_back(tmp_path, monkeypatch):
    session, prompt = begun()
    greedy(MODEL, prompt, session=session)  # nothing of it is read

    def fails(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(greedy(MODEL, prompt, session=session, on_progress=fails))
    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(Session, "go_on", lambda *given: (_ for _ in ()).throw(MemoryError()))
        list(greedy(MODEL, prompt, session=session))
    assert [part.token for part in greedy(MODEL, prompt, session=session)] == recomputed(MODEL, prompt, 12)
    session.save(tmp_path / "a")
    assert load_session(tmp_path / "a", MODEL).tokens == session.tokens


def test_another_thread_is_refused_too():
    session, prompt = begun()
    stream, errors = greedy(MODEL, prompt, session=session), []
    next(stream)

    def other():
        try:
            next(greedy(MODEL, PROMPT, session=session))
        except SessionError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert len(errors) == 1 and len(list(stream)) == 11


def test_one_that_is_answering_is_not_evicted():
    pool = Sessions(MODEL, most_bytes=0)
    one, other = pool.new(), pool.new()
    stream = greedy(MODEL, session=one)
    said = [next(stream).token]
    list(greedy(MODEL, session=other))
    assert other.tokens and one.cache.offset == len(PROMPT) + 1
    said += [part.token for part in stream]
    assert one.tokens == [*PROMPT, *said] and other.tokens == []


def test_a_session_of_another_model_is_refused():
    with pytest.raises(ValueError, match="another model's"):
        stream_generate(DRAFTER, Endless(), PROMPT, session=begun()[0])


def test_an_interrupt_anywhere_in_it_leaves_the_session_free():
    """Before each line of the guard, also of those that end it."""
    guard, session = Session.answering.__wrapped__, Session(MODEL)
    codes = (guard.__code__, Session._done.__code__)

    def interrupted(stop: int) -> bool:
        count = -1

        def trace(frame, event, value):
            nonlocal count
            if frame.f_code in codes and event == "line":
                count += 1
                if count == stop:
                    sys.settrace(None)
                    raise KeyboardInterrupt
            return trace

        sys.settrace(trace)
        try:
            for _ in guard(session):
                pass
        except KeyboardInterrupt:
            return True
        finally:
            sys.settrace(None)
        return False

    stops = 0
    while interrupted(stops):
        assert not session.in_use, stops
        with session.answering():
            assert session.in_use
        stops += 1
    assert 8 < stops < 40
