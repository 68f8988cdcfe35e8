"""When guesses are made: by what they save and what they cost."""

import pytest

from mlx_qwen35.experts.guessing import Guessing


def told(*, right: float, wait: float, copy: float, shared: bool = True, experts: int = 100) -> Guessing:
    """That so many of `experts` guesses came true; seconds for each expert."""
    guessing = Guessing(shared_processor=shared)
    tell(guessing, right=right, wait=wait, copy=copy, experts=experts)
    return guessing


def tell(guessing: Guessing, *, right: float, wait: float, copy: float, experts: int) -> None:
    guessing.made(experts)
    guessing.came_true(round(right * experts))
    guessing.waited(wait * experts, experts)
    guessing.copied(copy * experts, experts)


@pytest.mark.parametrize(
    ("right", "wait", "copy", "shared", "pays"),
    [
        (0.9, 3e-3, 1e-3, True, True),  # a slow disk
        (0.6, 3e-3, 1e-3, True, False),  # 0.6 ms gained, 1 ms spent
        (0.9, 0.5e-3, 0.6e-3, True, False),  # the page cache: what is copied costs what waiting would
        (0.6, 0.5e-3, 0.6e-3, False, True),  # nobody else needs the processor
        (0.4, 3e-3, 0.0, False, False),  # more wrong than right
    ],
)
def test_a_guess_has_to_save_more_than_it_takes(right, wait, copy, shared, pays):
    assert told(right=right, wait=wait, copy=copy, shared=shared).pays() is pays


@pytest.mark.parametrize("missing", ["made", "waited", "copied"])
def test_it_guesses_until_enough_is_known(missing):
    guessing = Guessing(shared_processor=True)
    for name, given in {"made": (32,), "waited": (1e-3, 32), "copied": (1.0, 32)}.items():
        if name != missing:
            getattr(guessing, name)(*given)
    assert guessing.pays()
    getattr(guessing, missing)(*((31,) if missing == "made" else (1e-3, 31)))
    assert guessing.pays()
    getattr(guessing, missing)(*((1,) if missing == "made" else (1.0, 1)))
    assert not guessing.pays()


def test_a_turn_now_and_then_tries_again():
    guessing = told(right=0.1, wait=1e-3, copy=1e-3)
    assert [number for number in range(1, 97) if guessing.pays()] == [32, 64, 96]


def test_what_was_given_up_is_neither_right_nor_wrong():
    guessing = told(right=0.4, wait=1e-3, copy=0.0)
    assert not guessing.pays()
    guessing.made(-40)
    assert guessing.pays()


def test_it_learns_anew_when_things_change():
    guessing = told(right=0.1, wait=1e-3, copy=1e-3, experts=5000)
    assert not guessing.pays()
    for _ in range(30):
        tell(guessing, right=0.95, wait=5e-3, copy=1e-3, experts=100)
    assert guessing.pays()
