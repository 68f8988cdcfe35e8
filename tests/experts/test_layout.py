"""Every byte of an expert is in exactly one piece, wherever its tensors lie and however large the jobs are."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qwen35.experts.layout import Chunk, Extent, Job, LayerLayout, Piece, Tensor, deal, join

A, B = Path("a.safetensors"), Path("b.safetensors")


@st.composite
def extents(draw: st.DrawFn) -> list[Extent]:
    """Extents that do not overlap, in two files, in any order, some with small gaps between them and some with none."""
    ends = {A: draw(st.integers(0, 100)), B: draw(st.integers(0, 100))}
    made = []
    for _ in range(draw(st.integers(1, 9))):
        file = draw(st.sampled_from([A, B]))
        offset = ends[file] + draw(st.sampled_from([0, 0, 1, 63, 64, 65, 5000]))
        size = draw(st.one_of(st.integers(1, 300), st.integers(4000, 30_000)))
        ends[file] = offset + size
        made.append(Extent(file, offset, size))
    return draw(st.permutations(made))


def covered(jobs: tuple[Job, ...] | list[list[Chunk]]) -> list[tuple[Path, int, int, int | None, int]]:
    """(file, first byte, bytes, tensor, where in it) of every piece, in the order of the jobs."""
    found = []
    for job in jobs:
        for chunk in job:
            at = chunk.offset
            for piece in chunk.pieces:
                found.append((chunk.file, at, piece.stop - piece.start, piece.tensor, piece.start))
                at += piece.stop - piece.start
            assert at - chunk.offset == chunk.nbytes
    return found


def check_whole(pieces: list[tuple[Path, int, int, int | None, int]], given: list[Extent]) -> None:
    """Every byte of every extent once and in its place; besides only what lies between two, less than 64 at a time."""
    done = [0] * len(given)
    for file, at, size, tensor, start in pieces:
        assert size > 0
        if tensor is None:
            assert size < 64
            inside = (e for e in given if e.file == file and e.offset < at + size and at < e.offset + e.nbytes)
            assert not any(inside)
            continue
        extent = given[tensor]
        assert (file, at) == (extent.file, extent.offset + start)
        assert start == done[tensor]  # in order, without gap or overlap
        done[tensor] += size
    assert done == [extent.nbytes for extent in given]


@given(extents(), st.data())
def test_joined_chunks_hold_every_byte_once(given: list[Extent], data: st.DataObject) -> None:
    steps = data.draw(st.lists(st.sampled_from([0, 0, 0, 4096]), min_size=len(given), max_size=len(given)))
    chunks = join(given, steps)
    check_whole(covered([chunks]), given)
    for chunk in chunks:
        numbers = [piece.tensor for piece in chunk.pieces if piece.tensor is not None]
        assert {steps[n] for n in numbers} == {chunk.step}
        assert chunk.pieces[0].tensor is not None and chunk.pieces[-1].tensor is not None
    for one, two in zip(chunks, chunks[1:], strict=False):  # what could have been one chunk is one
        near = two.offset - one.offset - one.nbytes < 64
        assert not (one.file == two.file and one.step == two.step and near)


@given(extents(), st.integers(1, 60_000))
def test_jobs_hold_every_byte_once(given: list[Extent], size: int) -> None:
    jobs = deal(join(given, [0] * len(given)), size)
    check_whole(covered(jobs), given)
    for _, _, length, tensor, start in covered(jobs):
        assert tensor is None or start % 4096 == 0 or start + length == given[tensor].nbytes
        assert start % 4096 == 0
    total = sum(chunk.nbytes for job in jobs for chunk in job)
    assert all(job and all(chunk.pieces for chunk in job) for job in jobs)
    assert len(jobs) <= max(1, total // size)
    share = -(-total // max(1, total // size))
    assert max(sum(chunk.nbytes for chunk in job) for job in jobs) < share + 2 * 4096 + 64


def test_large_experts_are_shared_evenly() -> None:
    """Of the 397B at 4 bits: 7 MB in nine tensors, in jobs of 2 MiB."""
    sizes = [2_097_152, 131_072, 131_072] * 3
    given, at = [], 0
    for size in sizes:
        given.append(Extent(A, at, size))
        at += 512 * size
    jobs = deal(join(given, [0] * 9), 2 << 20)
    found = [sum(chunk.nbytes for chunk in job) for job in jobs]
    assert len(jobs) == 3 and sum(found) == sum(sizes) and max(found) - min(found) <= 3 * 4096


def test_the_drawing_in_the_docstring() -> None:
    """Of tensors that are large enough to be cut."""
    page = 4096
    chunks = [Chunk(A, 0, 0, (Piece(0, 0, 8 * page),)), Chunk(B, 0, 0, (Piece(1, 0, 3 * page), Piece(2, 0, 5 * page)))]
    shares = [[piece.stop // page - piece.start // page for chunk in job for piece in chunk.pieces]
              for job in deal(chunks, 5 * page)]  # fmt: skip
    assert shares == [[6], [2, 3, 1], [4]]


def stacked(count: int, steps: tuple[int, ...] = (100, 50)) -> LayerLayout:
    tensors = (Tensor("gate_proj.weight", "U32", (5, 5)), Tensor("gate_proj.scales", "F16", (25,)))
    place = (Extent(A, 1000, 100), Extent(B, 7, 50))
    return LayerLayout(3, count, tensors, (place,), steps)


def test_stacked_experts_follow_one_another() -> None:
    layout = stacked(4)
    for expert in range(4):
        assert layout.extents(expert) == (Extent(A, 1000 + 100 * expert, 100), Extent(B, 7 + 50 * expert, 50))
    assert layout.files == (A, B) and layout.expert_bytes == layout.read_bytes == 150
    assert (layout.end(A), layout.end(B), layout.end(Path("c"))) == (1400, 207, 0)
    for expert in (-1, 4):
        for ask in (layout.extents, lambda e: layout.jobs(e, 100)):
            with pytest.raises(IndexError, match=f"layer 3 has experts 0 to 3, not {expert}"):
                ask(expert)


def per_expert(places: list[tuple[Extent, ...]]) -> LayerLayout:
    tensors = tuple(Tensor(f"t{n}", "U8", (extent.nbytes,)) for n, extent in enumerate(places[0]))
    return LayerLayout(0, len(places), tensors, tuple(places))


@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 20_000), st.data())
def test_an_expert_is_the_same_stacked_and_by_itself(
    count: int, parts: int, job: int, data: st.DataObject
) -> None:
    """What is to be read of an expert does not depend on how its layout is written down."""
    sizes = data.draw(st.lists(st.integers(1, 9000), min_size=parts, max_size=parts))
    steps = tuple(size + data.draw(st.integers(0, 70)) for size in sizes)
    begin, first = 0, []
    for size, step in zip(sizes, steps, strict=True):
        first.append(Extent(A, begin, size))
        begin += count * step
    tensors = tuple(Tensor(f"t{n}", "U8", (size,)) for n, size in enumerate(sizes))
    whole = LayerLayout(0, count, tensors, (tuple(first),), steps)
    single = LayerLayout(0, count, tensors, tuple(whole.extents(e) for e in range(count)))
    assert whole.end(A) == single.end(A) and whole.expert_bytes == single.expert_bytes
    for expert in range(count):
        check_whole(moved(whole.jobs(expert, job), expert), list(whole.extents(expert)))
        check_whole(moved(single.jobs(expert, job), expert), list(single.extents(expert)))


def moved(jobs: tuple[Job, ...], expert: int) -> list[tuple[Path, int, int, int | None, int]]:
    at = [(c.file, c.offset + expert * c.step, c) for job in jobs for c in job]
    return covered([[Chunk(file, offset, 0, chunk.pieces) for file, offset, chunk in at]])


def test_records_are_read_with_their_padding() -> None:
    """Parts of a record begin at multiples of 64: one chunk, of which the padding at the end is left."""
    tensors = tuple(Tensor(f"t{n}", "U8", (size,)) for n, size in enumerate((100, 64, 30)))
    place = (Extent(A, 0, 100), Extent(A, 128, 64), Extent(A, 192, 30))
    layout = LayerLayout(0, 9, tensors, (place,), (16384,) * 3)
    ((chunk,),) = layout.jobs(5, 1 << 20)
    assert [(p.tensor, p.stop - p.start) for p in chunk.pieces] == [(0, 100), (None, 28), (1, 64), (2, 30)]
    assert layout.read_bytes == 222 and layout.expert_bytes == 194
    assert layout.jobs(8, 1 << 20) is layout.jobs(5, 1 << 20)  # made once


def test_layouts_that_contradict_themselves() -> None:
    tensors = (Tensor("gate_proj.weight", "U8", (4,)), Tensor("up_proj.weight", "U8", (4,)))
    right = (Extent(A, 0, 4), Extent(A, 4, 4))
    for count, places, steps, problem in [
        (2, (right,), None, "1 places for 2 experts"), (2, (right, right), (8, 8), "2 places for 2 experts"),
        (1, ((Extent(A, 0, 4), Extent(A, 4, 5)),), None, "not of one size"), (1, (right[:1],), None, "not of one size"),
        (2, (right,), (8,), "1 steps for 2 tensors"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"layer 7: .*{problem}"):
            LayerLayout(7, count, tensors, places, steps)


@pytest.mark.parametrize("dtype, items", [("F32", 4), ("F16", 2), ("BF16", 2), ("U32", 4), ("U8", 1)])
def test_sizes_of_tensors(dtype: str, items: int) -> None:
    assert Tensor("t", dtype, (3, 5)).nbytes == 15 * items == 15 * np.dtype(f"u{items}").itemsize


def test_neighbours_with_other_steps_are_read_apart() -> None:
    """Expert 0 of two stacks may lie together, the others do not."""
    chunks = join([Extent(A, 0, 10), Extent(A, 10, 10)], [20, 30])
    assert [(chunk.offset, chunk.step) for chunk in chunks] == [(0, 20), (10, 30)]
    assert per_expert([(Extent(A, 0, 10), Extent(A, 10, 10))]).jobs(0, 1 << 20)[0][0].nbytes == 20
