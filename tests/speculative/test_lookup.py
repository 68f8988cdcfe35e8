"""The automaton against brute force: texts with few and with many words, periodic ones, separators, forgetting."""

import random
import tracemalloc

import pytest

from mlx_qwen35.speculative.lookup import NO_MATCH, Lookup


def longest(text, after=None):
    """By looking at every place: the longest end of the text (and a token more) that is there before, and where."""
    whole = text if after is None else [*text, after]
    length, place = 0, -1
    for end in range(len(text) - (after is None) - 1, -1, -1):
        own = 0
        while own <= end and whole[-1 - own] >= 0 and text[end - own] == whole[-1 - own]:
            own += 1
        if own > length:
            length, place = own, end
    return length, place


def texts():
    rng = random.Random(4)
    for words in (1, 2, 3, 20, 400):
        yield [rng.randrange(words) for _ in range(150)]
    pieces = [[rng.randrange(50) for _ in range(rng.randrange(2, 30))] for _ in range(6)]
    yield [token for _ in range(30) for token in rng.choice(pieces)][:250]
    yield [*range(10)] * 15
    yield [7] * 80 + [8] + [7] * 60
    first, second = [0], [0, 1]
    while len(second) < 150:
        first, second = second, second + first
    yield second
    yield [number for count in range(18) for number in range(count)]


@pytest.mark.parametrize("text", [*texts()])
def test_it_finds_what_brute_force_finds(text):
    lookup, rng = Lookup(), random.Random(9)
    for at, token in enumerate(text):
        coming = rng.choice([token, rng.choice(text)])
        expected, found = longest(text[:at], coming), lookup.after(coming)
        assert found.length == expected[0]
        assert matches(text[:at], coming, found)
        lookup.add(token)
        assert lookup.match.length == longest(text[: at + 1])[0]
        assert matches(text[:at], token, lookup.match)
    assert list(lookup.tokens) == text


def matches(text, coming, found):
    """Whether so many tokens do end there."""
    whole = [*text, coming]
    there = text[found.place + 1 - found.length : found.place + 1]
    return there == whole[len(whole) - found.length :] and len(there) == found.length


def test_the_latest_place_is_told_where_the_chain_of_links_is_short():
    text = [1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 8, 1, 2]
    lookup = Lookup(text)
    assert lookup.match == (2, 6) == longest(text)
    assert lookup.after(3) == (3, 7) and lookup.draft(lookup.after(3), 3, 3) == [5, 9, 8]
    assert lookup.draft(lookup.match, 2) == [3, 5]


def test_a_draft_goes_round_in_its_own_copy_and_ends_at_a_separator():
    lookup = Lookup([5, 1, 2, 3, 1, 2])
    assert lookup.draft(lookup.match, 7) == [3, 1, 2, 3, 1, 2, 3]
    assert lookup.draft(lookup.after(3), 5, 3) == [1, 2, 3, 1, 2]
    assert lookup.draft(lookup.after(8), 5, 8) == [] == lookup.draft(NO_MATCH, 5)
    one = Lookup([4, 4])
    assert one.draft(one.after(4), 3, 4) == [4, 4, 4]
    lookup = Lookup([1, 2, 3])
    lookup.separate()
    lookup.separate()
    assert len(lookup) == 4 and lookup.match == NO_MATCH == lookup.after(-1)
    lookup.extend([7, 1, 2])
    assert lookup.match == (2, 1) and lookup.draft(lookup.match, 5) == [3]
    assert Lookup([]).after(3) == NO_MATCH


@pytest.mark.parametrize("words", [1, 3, 60])
def test_beyond_its_limit_it_knows_the_younger_half(words):
    rng, text, lookup = random.Random(1), [], Lookup(limit=64)
    for number in range(300):
        token = rng.randrange(words)
        lookup.add(token)
        text.append(token)
        if number % 41 == 40:
            lookup.separate()
            text.append(-1)
        held = [max(token, -1) for token in lookup.tokens]
        assert held == text[-len(held) :] and len(held) <= 65
        assert lookup.match.length == longest(held)[0]
        assert number < 64 or len(held) >= 32


@pytest.mark.parametrize("count", [50_000, pytest.param(200_000, marks=pytest.mark.soak)])
def test_memory_of_many_tokens(count):
    """Half of it was said before, as in a session that repeats files; some words are followed by a thousand others."""
    rng, tokens = random.Random(2), []
    while len(tokens) < count:
        if rng.random() < 0.5 or len(tokens) < 1000:
            tokens += [int(rng.paretovariate(0.7)) % 150_000 for _ in range(200)]
        else:
            start = rng.randrange(len(tokens) - 300)
            tokens += tokens[start : start + 200]
    tokens = tokens[:count]
    tracemalloc.start()
    lookup = Lookup()
    lookup.extend(tokens)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 150 * count and 0.8 * peak < lookup.nbytes < 1.3 * peak
    assert len(lookup) == count
