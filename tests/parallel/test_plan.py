"""Plans of how a model is cut over ranks: numbers alone."""

import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.parallel.plan import LINKS, Host, Sizes, busiest, choose, plans, shared_out, undividable

GB = 10**9


def sizes(layers: int = 60, experts: int = 512, per_token: int = 10, **more: object) -> Sizes:
    """Like the 397B at 4.5 bits: 217 GB of experts."""
    how = {"indivisible": None} | more
    return Sizes(
        layers=(100 * 10**6,) * layers, experts=(7_080_000,) * layers if experts else (), num_experts=experts,
        experts_per_token=per_token, table=570 * 10**6, head=570 * 10**6, tied=False, beside=GB, hidden=4096,
        itemsize=2, cache=(5 * 10**6,) * layers, **how,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("count", "capacities", "expected"),
    [
        (8, [100, 100], [4, 4]),
        (8, [100, 100, 100], [3, 3, 2]),
        (8, [5, 100], [4, 4]),
        (8, [2, 100, 100], [2, 3, 3]),
        (8, [5.9, 2.2, 1.1], [5, 2, 1]),  # just enough
        (512, [10, 30], [128, 384]),  # not enough: in proportion
        (5, [0, 0, 0], [2, 2, 1]),
        (3, [100, 0.5, 0.5], [1, 1, 1]),  # one each at the least
    ],
)  # fmt: skip
def test_shares_are_contiguous_and_as_equal_as_memory_allows(count, capacities, expected) -> None:
    shares = shared_out(count, capacities)
    assert [stop - first for first, stop in shares] == expected
    assert shares[0][0] == 0 and shares[-1][1] == count
    assert all(a[1] == b[0] for a, b in zip(shares, shares[1:], strict=False))


def test_more_ranks_than_things_are_refused() -> None:
    with pytest.raises(ArgumentError, match="3 ranks"):
        shared_out(2, [1, 1, 1])


def test_the_busiest_rank_has_more_than_its_part_of_a_tokens_experts() -> None:
    assert busiest([(0, 128), (128, 256)], 8) == pytest.approx(5.1, abs=0.2)  # docs/DISTRIBUTED.md
    assert busiest([(0, 256), (256, 512)], 10) == pytest.approx(6.2, abs=0.2)
    assert busiest([(0, 4)], 8) == 4


def test_what_is_larger_than_one_host_is_held_by_two() -> None:
    plan = choose(sizes(), [Host(140 * GB), Host(140 * GB)], LINKS["tb5"])
    assert plan.fits and sum(plan.nbytes) > 217 * GB and max(plan.nbytes) <= 140 * GB
    assert "modelled" in plan.why and all(kind in plan.why for kind in ("experts", "pipeline", "tensor"))


def test_unequal_hosts_take_unequal_shares() -> None:
    plan = choose(sizes(), [Host(64 * GB), Host(200 * GB)], LINKS["10gbe"], "experts")
    (a, b), (c, d) = plan.shares
    assert d - c > 2 * (b - a) and plan.fits and plan.nbytes[0] <= 64 * GB


def test_over_tcp_resident_layers_go_one_after_the_other_and_streamed_experts_do_not() -> None:
    there = [Host(200 * GB)] * 2
    assert choose(sizes(), there, LINKS["10gbe"]).kind == "pipeline"  # two messages, not sixty
    scarce = [Host(60 * GB)] * 2
    streamed = choose(sizes(), scarce, LINKS["10gbe"])
    assert streamed.kind == "experts" and not streamed.fits  # disks add up


def test_a_dense_model_has_no_experts_to_share_out() -> None:
    with pytest.raises(ArgumentError, match="no experts"):
        choose(sizes(experts=0, per_token=0), [Host(64 * GB)] * 2, LINKS["tb5"], "experts")
    assert "experts" not in plans(sizes(experts=0, per_token=0), [Host(64 * GB)] * 2, LINKS["tb5"])


def test_heads_that_do_not_divide_are_refused_by_name() -> None:
    why = undividable(3, [("num_attention_heads", 16), ("intermediate_size", 96)], kv_heads=2)
    assert why == "3 ranks do not divide num_attention_heads 16, num_key_value_heads 2"
    assert undividable(4, [("num_attention_heads", 16)], kv_heads=2) is None  # repeated
    with pytest.raises(ArgumentError, match="num_attention_heads 16"):
        choose(sizes(indivisible=why), [Host(64 * GB)] * 3, LINKS["tb5"], "tensor")


def test_tensor_parallel_costs_a_token_two_sums_a_layer() -> None:
    made = plans(sizes(), [Host(200 * GB, 819e9)] * 2, LINKS["10gbe"])
    assert made["tensor"].seconds - made["experts"].seconds > 50 * LINKS["10gbe"].latency


def test_nothing_fits() -> None:
    with pytest.raises(ArgumentError, match="does not fit on 2 ranks"):
        choose(sizes(experts=0, per_token=0), [Host(GB)] * 2, LINKS["tb5"])
    with pytest.raises(ArgumentError, match="plan is 'odd'"):
        choose(sizes(), [Host(GB)] * 2, LINKS["tb5"], "odd")
