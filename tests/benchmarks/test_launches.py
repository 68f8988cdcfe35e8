"""The count of whole decode steps. In a process of its own: the models must meet the pretended Metal at import."""

import json
import subprocess
import sys

import pytest

from tests.conftest import CHECKOUT

SCRIPT = """
import json
from benchmarks import geometry, launches
from benchmarks.graph import PretendedMetal

def totals(side, size, layers):
    found = launches.count(side, size, layers, context=300)
    return [found.launches, found.moved, found.bound, found.held]

with PretendedMetal():
    made = {side: {size: totals(side, size, 8) for size in ("0.8B", "35B-A3B")} for side in launches.SIDES}
    made["deeper"] = totals("ours", "35B-A3B", 12)
    from mlx_qwen35.layers.mlp import MLP
    call = MLP.__call__
    MLP.__call__ = lambda mlp, x: call(mlp, x) * 2
    made["planted"] = totals("ours", "0.8B", 8)
    MLP.__call__ = call
    for side in ("ours", "exact"):
        found = launches.count(side, "35B-A3B", 8, context=300, rows=4)
        products = [a for kind in found.by_kind.values() for a in kind if a.name in ("QuantizedMatmul", "GatherQMM")]
        forms = sorted({(a.name, a.shape[:2]) for a in products})
        made["four " + side] = [found.launches, found.moved, found.asked, forms]
        found = launches.count(side, "0.8B", 4, context=300, rows=20)
        made["prompt " + side] = [a.name for a in found.by_kind["linear_attention"]]
    for side in launches.DENSE_SIDES:
        found = launches.count(side, "0.8B", 4, context=300)
        names = [a.name for kind in ("linear_attention", "full_attention") for a in found.by_kind[kind]]
        made[side] = [found.launches, found.moved, names.count("Hadamard"), names.count("AsType")]
    made["eight tokens"] = launches.count("ours", "35B-A3B", 8, context=300, rows=8).launches
    made["eight"] = {}
    for side in launches.ALL_SIDES:
        for size in ("35B-A3B", "397B-A17B"):
            for batch, context in ((1, 1600), (8, 1600), (8, 400)):
                found = launches.count(side, size, 8, context=context, batch=batch)
                names = [a.name for a in found.by_kind["full_attention"]]
                made["eight"][f"{side} {size} {batch} {context}"] = [found.launches, found.moved, found.bound, names]
print(json.dumps(made))
"""


@pytest.fixture(scope="module")
def made() -> dict:
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_mlx_lm_comes_to_about_forty_a_layer(made: dict) -> None:
    launches, *_ = made["mlx-lm"]["35B-A3B"]
    assert 38 * 40 <= launches <= 45 * 40


def test_a_rotation_before_each_product(made: dict) -> None:
    """Four in a layer, of three launches each: signs, the transform, a cast. It moves little."""
    (plain, moved, *none), (turned, more, transforms, casts) = made["2-bit"], made["rotated"]
    assert none == [0, 0] and transforms == casts == 2 * 4
    assert plain < turned < 4 * plain and moved < more < 1.05 * moved


def test_fewer_layers_stand_for_all(made: dict) -> None:
    assert made["deeper"] == made["ours"]["35B-A3B"]


def test_a_planted_operation_is_noticed_in_every_layer(made: dict) -> None:
    assert made["planted"][0] == made["ours"]["0.8B"][0] + 24


def test_exact_rows_are_products_of_their_own_and_attend_alone(made: dict) -> None:
    usual, exact = made["four ours"], made["four exact"]
    assert exact[3] == [["GatherQMM", [4, 1]]] and {name for name, _ in usual[3]} == {"QuantizedMatmul"}
    assert exact[0] == usual[0] + 4 * 10 and exact[1] == pytest.approx(usual[1], rel=0.01)
    assert usual[2] == usual[1] and 1.2 * usual[2] < exact[2] < 2 * usual[2]


def test_an_exact_prompt_goes_through_the_kernel_that_decodes(made: dict) -> None:
    assert made["prompt exact"].count("kernel delta_decode") == 1
    assert not [name for name in made["prompt exact"] if "gated_delta" in name]
    assert "fast.gated_delta_update" in made["prompt ours"]


@pytest.mark.parametrize("size", ["0.8B", "35B-A3B"])
def test_a_step_launches_less_than_half_of_mlx_lms(made: dict, size: str) -> None:
    assert made["ours"][size][0] < made["mlx-lm"][size][0] / 2


@pytest.mark.parametrize("size", ["0.8B", "35B-A3B"])
def test_both_sides_have_the_same_bound_and_move_more(made: dict, size: str) -> None:
    (_, ours, bound, held), (_, theirs, *same) = made["ours"][size], made["mlx-lm"][size]
    assert [bound, held] == same
    assert bound < ours < 1.03 * bound and bound < theirs


def test_the_bound_is_that_of_the_published_sizes(made: dict) -> None:
    # 0.8B, tied: 752.4 million weights, 4 bits and 2 x 2 bytes for 64 of them, and 18.6 MiB of states, twice.
    assert made["ours"]["0.8B"][2] == pytest.approx(752.4e6 * 4.5 / 8 + 2 * 18.6 * 2**20 + 301 * 12288, rel=0.01)
    assert made["ours"]["35B-A3B"][3] == pytest.approx(34660.6e6 * 4.5 / 8, rel=0.02)


@pytest.mark.parametrize("size", ["35B-A3B", "397B-A17B"])
def test_eight_rows_of_unequal_lengths_launch_hardly_more_than_one(made: dict, size: str) -> None:
    eight = made["eight"]
    one, long, short = (eight[f"ours {size} {rows}"] for rows in ("1 1600", "8 1600", "8 400"))
    assert one[0] < long[0] <= 1.15 * one[0]
    assert short[0] == one[0]
    assert long[3].count("kernel ragged_attention") == long[3].count("kernel ragged_sum") == 1
    assert long[3].count("SliceUpdate") == 2 and "kernel ragged_sum" not in short[3]
    # What they move is what they must, which for mlx-lm's padded rows, counted from the same lengths, is more.
    theirs = eight[f"mlx-lm {size} 8 1600"]
    assert long[2] < long[1] < 1.03 * long[2] and theirs[2] == pytest.approx(long[2], rel=1e-3)
    assert theirs[1] > long[1] and theirs[0] > 3 * long[0]


def test_verifying_eight_tokens_launches_hardly_more_than_one(made: dict) -> None:
    assert made["ours"]["35B-A3B"][0] < made["eight tokens"] <= 1.2 * made["ours"]["35B-A3B"][0]


def test_exact_rows_attend_one_by_one(made: dict) -> None:
    assert made["eight"]["exact 35B-A3B 8 1600"][3].count("fast.scaled_dot_product_attention") == 8
