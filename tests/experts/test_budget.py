"""What a plan shares out adds up to no more than there is, and to nearly all of it."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qwen35.experts.budget import LEAST_SPARE, LEAST_TOKENS, Needs, StreamPlan, least, plan

MB = 1 << 20
# About the 35B at 4 bits in bfloat16.
NEEDS = Needs(
    experts=(1_769_472,) * 40,
    num_experts=256,
    experts_per_token=8,
    trunk=2_000 * MB,
    reserve=300 * MB,
    cache=700 * MB,
    loading=1_000 * MB,
    loading_layer=1_300 * MB,
    mixing=lambda tokens: 50 * MB + tokens * 400_000,
    feeding=lambda tokens: 20 * MB + tokens * 300_000,
)


def taken(made: StreamPlan, needs: Needs) -> int:
    """The most that exists at a time, by the plan's own terms."""
    slots = sum(count * size for count, size in zip(made.slots, needs.experts, strict=True))
    running = needs.cache + needs.mixing(made.tile) + needs.feeding(made.chunk) + 2 * made.group * max(needs.experts)
    loading = needs.loading_layer if needs.num_experts in made.slots else needs.loading
    return needs.trunk + needs.reserve + made.cache_limit + slots + max(loading, running)


def some_needs() -> st.SearchStrategy[Needs]:
    sizes = st.integers(0, 4000 * MB)
    slopes = st.integers(0, 4 * MB)

    def made(experts: list[int], num: int, per_token: int, rest: list[int], slope: tuple[int, int]) -> Needs:
        trunk, reserve, cache, loading, loading_layer, mix, feed = rest
        mixing, feeding = lambda tokens: mix + tokens * slope[0], lambda tokens: feed + tokens * slope[1]
        return Needs(
            tuple(experts), num, min(per_token, num - 1), trunk, reserve, cache, loading, loading_layer, mixing, feeding
        )

    experts = st.lists(st.integers(1000, 8 * MB), min_size=1, max_size=60)
    return st.builds(
        made, experts, st.integers(2, 512), st.integers(1, 10), st.lists(sizes, min_size=7, max_size=7),
        st.tuples(slopes, slopes),
    )  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(needs=some_needs(), more=st.integers(0, 1 << 40))
def test_every_plan_fits(needs: Needs, more: int) -> None:
    memory = sum(least(needs).values()) + more
    made = plan(memory, needs)
    assert taken(made, needs) <= memory == made.memory
    assert all(needs.experts_per_token <= count <= needs.num_experts for count in made.slots)
    assert len(made.slots) == len(needs.experts) and max(made.slots) - min(made.slots) <= 1
    assert 1 <= made.group <= max(1, needs.num_experts // 2)
    assert LEAST_TOKENS <= made.tile <= made.chunk
    assert made.cache_limit >= LEAST_SPARE
    with pytest.raises(ValueError, match=f"{memory - more - 1} bytes are 1 under"):
        plan(memory - more - 1, needs)


@pytest.mark.parametrize("memory", [6_000, 9_000, 14_000, 18_000])
def test_most_of_the_memory_becomes_slots(memory: int) -> None:
    made = plan(memory * MB, NEEDS)
    assert memory * MB - taken(made, NEEDS) < max(NEEDS.experts)  # nothing is left over
    rest = memory * MB - sum(least(NEEDS).values())
    pool = sum(made.slots) * NEEDS.experts[0] - NEEDS.experts_per_token * sum(NEEDS.experts)
    assert pool >= 0.7 * rest


def test_steps_grow_with_memory() -> None:
    small, large = (plan(memory * MB, NEEDS) for memory in (5_600, 20_000))
    assert (small.chunk, small.tile, small.group) < (large.chunk, large.tile, large.group)
    assert small.slots[0] < large.slots[0] and small.cache_limit < large.cache_limit
    assert large.chunk == 4096 and large.group == 32


def test_bytes_that_are_left_over_go_to_the_first_layers() -> None:
    needs = replace(NEEDS, experts=(3 * MB, 5 * MB, 2 * MB))
    made = {plan(least_of(needs) + more * MB, needs).slots for more in range(40)}
    assert {(9, 8, 8), (9, 8, 9), (9, 9, 8), (9, 9, 9)} <= made
    assert (8, 8, 9) in made and (8, 9, 8) not in made  # five that are left over are three for the first


def test_a_layer_that_cannot_be_loaded_whole_is_streamed() -> None:
    """Loading it would take more for a moment than there is, though its experts fit."""
    needs = replace(NEEDS, experts=(1_000_000,), loading_layer=0)
    memory = 5_600 * MB
    assert plan(memory, needs).slots == (256,)
    assert plan(memory, replace(needs, loading_layer=memory)).slots == (255,)


def least_of(needs: Needs) -> int:
    return sum(least(needs).values())


def test_what_the_least_consists_of() -> None:
    parts = least(NEEDS)
    assert parts["8 experts a layer"] == 8 * 40 * 1_769_472
    assert "reading weights" in parts and "the cache" not in parts
    parts = least(replace(NEEDS, loading=0))
    assert parts["the cache"] == NEEDS.cache
    assert parts["a prompt"] == 70 * MB + 16 * 700_000 + 2 * 1_769_472
