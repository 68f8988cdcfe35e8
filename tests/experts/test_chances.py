"""How many layers are queued before a look: by what it saves, and by what is computed in vain."""

import pytest

from mlx_qwen35.experts.chances import Chances


def told(lacking: dict[int, int], *, seconds: float, looks: int = 400) -> Chances:
    """lacking: of each streamed layer, every how many looks it lacks an expert; 0: never. seconds: of a layer."""
    chances = Chances(lacking)
    for number in range(looks):
        for layer, every in lacking.items():
            chances.looked(layer, bool(every) and number % every == 0)
    chances.took(8 * seconds, 8)
    return chances


def test_nothing_is_hoped_for_before_anything_is_known():
    assert Chances(range(4)).length(range(4)) == 1


@pytest.mark.parametrize(
    ("every", "seconds", "length"),
    [
        (0, 1e-3, 8),  # all lie in memory
        (2, 1e-3, 1),
        (1, 1e-9, 1),  # never there: nothing is saved, however little a layer takes
        (10, 1e-3, None),  # some
        (40, 1.0, 1),  # a large model, whose layers are dear
        (40, 1e-9, 8),
    ],
)
def test_as_many_as_pay(every, seconds, length):
    found = told(dict.fromkeys(range(8), every), seconds=seconds).length(range(8))
    assert found == length or (length is None and 1 < found < 8)


def test_a_layer_that_often_lacks_one_ends_a_window():
    """What it lacks is done again by itself; those behind it would have been computed in vain."""
    chances = told(dict.fromkeys(range(8), 0) | {4: 2}, seconds=1e-3)
    assert [chances.length(range(first, 8)) for first in range(8)] == [5, 4, 3, 2, 1, 3, 2, 1]


def test_layers_that_are_not_streamed_lack_nothing():
    chances = told({2: 2}, seconds=1e-3)
    assert chances.length(range(4)) == 3 and chances.length(range(3, 4)) == 1


def test_what_was_long_ago_counts_no_more():
    chances = told(dict.fromkeys(range(4), 2), seconds=1e-3)
    for _ in range(100):
        for layer in range(4):
            chances.looked(layer, False)
    assert chances.length(range(4)) == 4
