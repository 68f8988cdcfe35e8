"""Which snapshots are kept: never too many, and never a stretch without one that is longer than the spacing."""

from types import SimpleNamespace

from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qwen35.session.marks import FEWEST, MOST, Marks


def of(nbytes: int):
    return SimpleNamespace(nbytes=nbytes)


def walked(marks: Marks, length: int, chunk: int, meetings: set[int], nbytes: int) -> None:
    """As a session does: chunks that end early at meetings, and one token at a time for the last tenth."""
    offset = 0
    while offset < length:
        ahead = chunk if offset < length * 9 // 10 else 1
        offset = min([offset + ahead, length, *(m for m in meetings if m > offset)])
        if offset in meetings or marks.due(offset, ahead):
            marks.add(offset, of(nbytes), met=offset in meetings)


@settings(max_examples=100, deadline=None)
@given(
    length=st.integers(1, 5000),
    chunk=st.integers(1, 64),
    meetings=st.sets(st.integers(1, 5000), max_size=40),
    room=st.integers(0, 80),
)
def test_a_prompt_that_parts_anywhere_computes_less_than_a_spacing_again(length, chunk, meetings, room):
    marks = Marks(room * 100, 64)
    walked(marks, length, chunk, meetings, 100)
    assert len(marks) <= min(max(room, FEWEST), MOST)
    offsets = [0, *(mark.offset for mark in marks), length]
    assert offsets == sorted(set(offsets[:-1])) + [length]
    assert max(b - a for a, b in zip(offsets, offsets[1:], strict=False)) <= marks.spacing(length)


def test_where_all_prompts_meet_is_kept_and_the_last_places():
    marks = Marks(0, 10)
    walked(marks, 1000, 10, {7, 500, 991, 995}, 100)
    assert {7, 991, 995} <= {mark.offset for mark in marks}
    assert len(marks) == FEWEST


def test_the_spacing_follows_from_the_bytes():
    few, many = Marks(800, 256), Marks(1 << 30, 256)
    for marks in (few, many):
        marks.add(1, of(100), met=True)
    assert (few.most, many.most) == (8, 64)
    assert (few.spacing(1024), few.spacing(1025), many.spacing(8192), many.spacing(8193)) == (256, 512, 256, 512)


def test_going_back():
    marks = Marks(1 << 20, 256)
    for offset in (10, 20, 30):
        marks.add(offset, of(1), met=True)
    assert (marks.last(9), marks.last(29).offset, marks.last(30).offset) == (None, 20, 30)
    marks.cut(20)
    assert [mark.offset for mark in marks] == [10, 20]
    marks.add(20, of(5), met=False)  # in place of the old one
    assert marks.nbytes == 6


def kept(offsets: list[int], met: set[int] = frozenset()) -> list[int]:
    """What is left of marks of which there is one too many."""
    marks = Marks(0, 8)  # four are kept, and 16 tokens between two are no loss in so short a timeline
    for offset in offsets:
        marks.add(offset, of(100), met=offset in met)
    return [mark.offset for mark in marks]


def test_where_none_is_to_spare_the_one_goes_that_leaves_the_shortest_stretch():
    """Neither the first nor the last two, whatever they leave."""
    assert kept([1, 41, 71, 72, 73]) == [1, 41, 72, 73]  # 41 would leave 70, and 71 only 31
    assert kept([40, 41, 71, 111, 151]) == [40, 71, 111, 151]  # 41 would leave 31, and 71 leaves 70
    assert kept([30, 70, 110, 111, 112]) == [30, 70, 111, 112]  # 110 leaves 41; without the last two it would be 2
    assert kept([1, 2, 90, 170, 250]) == [1, 90, 170, 250]  # 1 would leave 2, and 2 leaves 89


def test_of_those_to_spare_the_oldest_on_the_way_goes():
    assert kept([10, 12, 14, 16, 18], met={12}) == [10, 12, 16, 18]
    assert kept([10, 12, 14, 16, 18], met={12, 14}) == [10, 14, 16, 18]
    assert kept([10, 12, 14, 16, 18]) == [10, 14, 16, 18]
