"""Where keys and values of rows lie, and how the kernel is told: a table for each launch.

Knows positions and arrays by their numbers. Knows no values.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import mlx.core as mx

MOST_ARRAYS = 13  # pairs of keys and values that a launch can have: Metal passes 31 buffers
SPAN = 512  # positions of a row that one threadgroup takes
_LEAST = 8  # elements: MLX passes smaller arrays in another address space

Arrays = tuple[mx.array, mx.array]  # keys and values [N, Hkv, capacity, D]


class Piece(NamedTuple):
    """`count` positions of a row that follow one another in a pair of arrays, from position `first` on.

    arrays: the number of the pair; row: which of its N.
    """

    arrays: int
    row: int
    first: int
    count: int


Pieces = tuple[Piece, ...]  # of a row, in the order of its positions


class Launch(NamedTuple):
    """arrays: numbers of the pairs that it reads; items: threadgroups for a head; table: as body.metal has it."""

    arrays: tuple[int, ...]
    items: int
    table: mx.array


class Plan(NamedTuple):
    """firsts: of each row, the number of its first item, and behind the last how many there are; `first` the same as an
    array. whole: every row is one item. span: positions of an item."""

    launches: tuple[Launch, ...]
    firsts: tuple[int, ...]
    first: mx.array
    whole: bool
    span: int


class _Item(NamedTuple):
    row: int
    span: int
    arrays: frozenset[int]


@lru_cache(maxsize=16)  # all layers of a step ask for the same
def planned(
    rows: tuple[Pieces, ...], capacities: tuple[int, ...], kv_heads: int, span: int = SPAN, most: int = MOST_ARRAYS
) -> Plan | None:
    """Launches for rows of one position or more. capacities: of each pair of arrays.

    As many as it takes for none to read more than `most` pairs. -> None where one span of a row alone has more.
    """
    items, firsts = [], [0]
    for number, pieces in enumerate(rows):
        items += _items(number, pieces, span)
        firsts.append(len(items))
    if any(len(item.arrays) > most for item in items):
        return None
    launches, held, start = [], frozenset[int](), 0
    for number, item in enumerate(items):
        if len(held | item.arrays) > most:
            launches.append(_launch(items[start:number], held, rows, capacities, kv_heads))
            held, start = frozenset(), number
        held |= item.arrays
    launches.append(_launch(items[start:], held, rows, capacities, kv_heads))
    return Plan(tuple(launches), tuple(firsts), _numbers(firsts), len(items) == len(rows), span)


def _items(number: int, pieces: Pieces, span: int) -> Iterator[_Item]:
    total, used = sum(piece.count for piece in pieces), []
    start = 0
    for piece in pieces:
        used.append((start, start + piece.count, piece.arrays))
        start += piece.count
    for at in range(0, total, span):
        yield _Item(number, at // span, frozenset(which for a, b, which in used if a < at + span and b > at))


def _launch(
    items: Sequence[_Item],
    held: frozenset[int],
    rows: Sequence[Pieces],
    capacities: Sequence[int],
    kv_heads: int,
) -> Launch:
    order = tuple(sorted(held))
    slots = {arrays: slot for slot, arrays in enumerate(order)}
    about: list[int] = []
    where: list[int] = []
    for number, item in enumerate(items):
        if number and items[number - 1].row == item.row:
            continue
        pieces = rows[item.row]
        about += [number, item.span, item.row, len(where) // 5, sum(piece.count for piece in pieces)]
        start = 0
        for piece in pieces:
            stop = start + piece.count
            # A slot that this launch does not have is of positions that its items do not reach.
            place = [slots.get(piece.arrays, 0), stop, capacities[piece.arrays], piece.row * kv_heads]
            where += [*place, piece.first - start]
            start = stop
    return Launch(order, len(items), _numbers([len(about) // 5, *about, *where]))


def _numbers(values: Sequence[int]) -> mx.array:
    return mx.array([*values, *[0] * (_LEAST - len(values))], mx.int32)
