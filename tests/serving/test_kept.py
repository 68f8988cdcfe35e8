"""Earlier answers: which are dropped, and that a conversation never loses its beginning."""

import random

from mlx_qwen35.serving.kept import Kept


def test_a_conversation_is_there_as_a_whole():
    kept = Kept()
    kept.add("a", 1, 10)
    kept.add("b", 2, 10, before="a")
    kept.add("c", 3, 10, before="b")
    kept.add("other", 4, 10, before="a")
    assert kept.until("c") == [1, 2, 3] and kept.until("other") == [1, 4] and kept.until("a") == [1]
    assert kept.get("c") == 3 and kept.nbytes == 40
    assert kept.until("d") is None and kept.get("d") is None


def test_what_was_used_longest_ago_is_dropped_first():
    kept = Kept(most=3)
    for name in "abc":
        kept.add(name, name, 1)
    kept.until("a")
    kept.add("d", "d", 1)
    assert [name for name in "abcd" if kept.get(name)] == ["a", "c", "d"]


def test_a_long_conversation_is_dropped_from_its_end():
    kept = Kept(most=3)
    for name, before in zip("abcd", (None, "a", "b", "c"), strict=True):
        kept.add(name, name, 1, before=before)
    assert kept.until("c") == ["a", "b", "c"] and kept.get("d") is None
    kept.add("e", "e", 1)
    assert kept.until("b") == ["a", "b"] and kept.get("c") is None
    kept.add("f", "f", 1, before="c")  # which is gone
    assert kept.get("f") is None


def test_bytes_are_bounded_too():
    kept = Kept(most_bytes=100)
    kept.add("a", "a", 60)
    kept.add("b", "b", 60)
    assert kept.get("a") is None and kept.get("b") == "b" and kept.nbytes == 60
    kept.add("c", "c", 101)
    assert len(kept) == 0 and kept.nbytes == 0


def test_a_dropped_answer_stays_in_what_went_on_from_it():
    kept = Kept()
    kept.add("a", 1, 10)
    kept.add("b", 2, 10, before="a")
    kept.add("c", 3, 10, before="b")
    assert kept.drop("b") and kept.get("b") is None and kept.until("b") is None and not kept.drop("b")
    assert kept.until("c") == [1, 2, 3]
    assert kept.drop("c") and len(kept) == 1 and kept.nbytes == 10  # and what only it went on from
    assert kept.until("a") == [1] and not kept.drop("x")


def test_beginnings_outlast_what_goes_on_from_them():
    drawn = random.Random(1)
    kept, before_of = Kept(most=12, most_bytes=400), {}
    for at in range(600):
        names = [*before_of][-20:]
        before_of[at] = before = drawn.choice([None, *names])
        kept.add(str(at), at, drawn.randrange(80), before=None if before is None else str(before))
        if names and drawn.random() < 0.2:
            kept.drop(str(drawn.choice(names)))
        assert len(kept) <= 12 and 0 <= kept.nbytes <= 400
        for name in [*before_of][-30:]:
            if kept.get(str(name)) is not None:
                whole = kept.until(str(name))
                assert whole[-1] == name and before_of[whole[0]] is None
                assert all(before_of[after] == one for one, after in zip(whole, whole[1:], strict=False))
