"""The stored table of what is left after quantization: complete, and none of the others' rows is beyond ours."""

import json

import pytest

from benchmarks.quality import LM, RESULTS, VLM, candidates, not_reached

ROWS = json.loads((RESULTS / "quality.json").read_text())


def test_every_recipe_has_its_row() -> None:
    assert {candidate.key for candidate in candidates(vlm=True)} == set(ROWS)
    assert {row["fails"] for key, row in ROWS.items() if "bits" not in row and "awq" not in key} == set()


def test_ours_reach_the_others() -> None:
    assert not_reached(ROWS) == []
    assert sum("bits" in row for key, row in ROWS.items() if key.startswith((LM, VLM))) > 25


@pytest.mark.parametrize("measure", ["kl_reply", "kl_prompt"])
def test_a_better_one_of_the_others_is_named(measure: str) -> None:
    smallest = min(row["bits"] for row in ROWS.values() if "bits" in row)
    least = min(row[measure] for row in ROWS.values() if "bits" in row)
    for planted in ({"bits": smallest - 0.001}, {measure: least / 2}):
        row = {"bits": 4.0, "kl_reply": 1.0, "kl_prompt": 1.0} | planted
        assert f"{LM}: planted ({measure})" in not_reached(ROWS | {f"{LM}: planted": row})
