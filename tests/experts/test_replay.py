"""The pools that only the replay study has, and the traces it draws: held against what must be true of them."""

import numpy as np
import pytest

from benchmarks.replay import ByValue, belady, by_importance, pools, repeats, residency_pool
from benchmarks.routing import RENORMED, zipf

DRAWN = zipf(layers=2, tokens=300, num_experts=40, top_k=4, skew=0.8, stay=0.3, topic=100)


@pytest.mark.parametrize("slots", [4, 7, 20, 40])
def test_values_that_are_times_make_lru(slots):
    for ids in DRAWN.ids:
        lru = residency_pool(40, slots, "lru")
        # Of one token's experts, Residency counts those that were held as older than those that were read.
        pool = ByValue(40, slots, lambda token, experts: np.full(len(experts), float(token)))
        ours, theirs = (sum(ask(experts) for experts in ids.tolist()) for ask in (lru, pool))
        assert abs(ours - theirs) <= 0.01 * ids.size  # they differ in ties only


@pytest.mark.parametrize("slots", [4, 7, 20, 40])
def test_nothing_reads_less_than_belady(slots):
    for ids in DRAWN.ids:
        missed = {name: sum(map(ask, ids.tolist())) for name, ask in pools(40, slots, ids).items()}
        assert missed["Belady"] == min(missed.values())
        assert slots > 4 or len(set(missed.values())) == 1  # no choice
        assert slots < 40 or set(missed.values()) == {len(np.unique(ids))}  # everything is read once


def test_belady_by_hand():
    """Two slots, one expert a token: 0 1 2 0 2 keeps 0 when 2 comes, and 2 when 0 does."""
    ids = np.array([[0], [1], [2], [0], [2]])
    pool = ByValue(3, 2, belady(3, ids))
    assert [pool(experts) for experts in ids.tolist()] == [1, 1, 1, 0, 0]


def test_drawn_traces_are_as_asked():
    def drawn(**asked):
        return zipf(**{"layers": 3, "tokens": 400, "num_experts": 64, "top_k": 6, "skew": 0.0, "stay": 0.0} | asked)

    trace = drawn(recall=0.7)
    assert all(len(set(experts)) == 6 for layer in trace.ids for experts in layer.tolist())
    named = (trace.ranked[RENORMED][:, :, :, None] == trace.ids[:, :, None]).any(2).mean()
    assert named == pytest.approx(0.7, abs=0.02)
    assert repeats(trace.ids[0]) == pytest.approx(6 / 64, abs=0.03)
    assert repeats(drawn(stay=0.5).ids[0]) == pytest.approx(0.5 + 0.5 * 3 / 61, abs=0.05)
    counts = np.bincount(drawn(skew=1.2).ids[0].flatten(), minlength=64)
    assert counts.max() > 8 * np.median(counts)


def test_importance_is_use_and_lateness():
    ids = np.array([[0, 1], [0, 1], [2, 1], [3, 0]])
    assert by_importance(5, ids, 1e9)[:2] == [0, 1]
    assert by_importance(5, ids, 0.5)[:3] == [0, 3, 1] and 4 not in by_importance(5, ids, 0.5)
