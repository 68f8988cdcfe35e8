"""How many tokens to guess: what pays most is found, kept, and left when it pays no more. Times are made up."""

import random

import pytest

from mlx_qwen35.speculative.pace import Pace


class World:
    """Rounds and plain steps that take given times; guess j is right with chance[j]."""

    def __init__(self, plain: float, call: float, guess: float, chance: list[float], seed: int = 1) -> None:
        self.plain, self.call, self.guess, self.chance = plain, call, guess, chance
        self.random = random.Random(seed)
        self.seconds, self.tokens = 0.0, 0
        self.rounds: list[tuple[int, int]] = []  # guesses, tokens

    def run(self, pace: Pace, tokens: int) -> None:
        goal = self.tokens + tokens
        while self.tokens < goal:
            count = pace.choose()
            noise = self.random.uniform(0.9, 1.1)
            if count:
                right = 0
                while right < count and self.random.random() < self.chance[right]:
                    right += 1
                seconds = (self.call + count * self.guess) * noise
                made = right + 1
                pace.guessed(count, right, seconds)
            else:
                made = pace.plain_tokens()
                seconds = made * self.plain * noise
                pace.decoded(made, seconds)
            self.seconds += seconds
            self.tokens += made
            self.rounds.append((count, made))

    def share(self, count: int, last: int) -> float:
        """Of the last tokens, how many came of rounds with so many guesses."""
        of_all, of_count = 0, 0
        for guesses, made in reversed(self.rounds):
            of_all, of_count = of_all + made, of_count + made * (guesses == count)
            if of_all >= last:
                break
        return of_count / of_all


GOOD, FALLING, BAD = [0.95, 0.93, 0.92, 0.9], [0.9, 0.5, 0.3, 0.2], [0.2, 0.1, 0.1, 0.1]


@pytest.mark.parametrize(
    "world, most, best",
    [
        (World(10, 11, 1, GOOD), 4, 4),  # a GPU that reads weights: a row more costs little
        (World(10, 11, 1, GOOD), 2, 2),
        (World(10, 10, 4, FALLING), 4, 1),
        (World(10, 12, 1, BAD), 4, 0),
        (World(10, 10, 10, GOOD), 4, 0),  # a row more costs a row
        (World(10, 30, 1, GOOD), 3, 3),
    ],
    ids=lambda value: f"{value.call}-{value.guess}" if isinstance(value, World) else None,
)
def test_what_pays_most_is_found_and_kept(world, most, best):
    pace = Pace(most)
    world.run(pace, 3000)
    assert world.share(best, 2000) > 0.9
    rates = {}
    for count in range(most + 1):
        likely = expected = 1.0
        for chance in world.chance[:count]:
            likely *= chance
            expected += likely
        rates[count] = expected / (world.call + count * world.guess if count else world.plain)
    assert world.tokens / world.seconds > 0.93 * max(rates.values()), "trying others costs too much"
    assert max(rates, key=rates.get) == best


def test_it_follows_a_change():
    pace, world = Pace(3), World(10, 11, 1, BAD)
    world.run(pace, 2000)
    assert world.share(0, 500) > 0.9
    world.chance = GOOD
    world.run(pace, 3000)
    assert world.share(3, 500) > 0.8
    world.call = 60  # as where the context has grown, or another program runs
    world.run(pace, 2000)
    assert world.share(0, 500) > 0.8


def test_hiccups_change_nothing():
    pace, world = Pace(3), World(10, 11, 1, GOOD)
    world.run(pace, 300)
    for _ in range(3):
        pace.guessed(3, 3, 1000.0)
        world.run(pace, 40)
    world.run(pace, 150)
    assert world.share(3, 150) > 0.8


def test_acceptance_is_by_position():
    pace, world = Pace(4), World(10, 10, 0.1, [0.9, 0.6, 0.3, 0.8])
    world.run(pace, 4000)
    assert pace.choose() in range(5)
    for mine, wanted in zip(pace.acceptance[:2], world.chance[:2], strict=True):
        assert abs(mine - wanted) < 0.12


def test_steady_and_limits():
    pace, world = Pace(3, steady=True), World(1, 100, 100, BAD)
    world.run(pace, 300)
    assert {count for count, _ in world.rounds} == {3}
    for most in (0, 5, -1):
        with pytest.raises(ValueError, match=f"num_draft_tokens is {most}; it must be 1 to 4"):
            Pace(most)
