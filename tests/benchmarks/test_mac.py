"""The table of expected speeds: its model obeys what must be true of it, and its measurement runs."""

import json

import pytest

from benchmarks import mac
from mlx_qwen35.library import demo_folder, speed


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> dict[tuple[str, str], mac.Row]:
    made = mac.modelled(tmp_path_factory.mktemp("models"))
    return {(row.machine, row.model): row for row in made}


def test_what_fits_is_not_streamed(rows):
    assert rows["M4 Max, 128 GB", "122B"].held == 1.0 and rows["M4 Max, 128 GB", "122B"].hits is None
    assert 0 < rows["M4 Max, 128 GB", "397B"].held < 1.0
    assert ("M4, 16 GB", "397B") not in rows  # not even the smallest pool


def test_the_headline_is_in_it(rows):
    """The 397B on 48 to 128 GB, the 122B on 32 GB, the 35B on 16 GB."""
    for machine, model in [("M4 Pro, 48 GB", "397B"), ("M5, 32 GB", "122B"), ("M4, 16 GB", "35B")]:
        assert rows[machine, model].held < 1.0 and rows[machine, model].decode[0] > 0


def test_more_of_anything_is_never_slower(rows):
    for model in ("122B", "397B"):
        five, four = rows["M5 Max, 128 GB", model], rows["M4 Max, 128 GB", model]
        assert all(a >= b for a, b in zip(five.decode, four.decode, strict=True))
    for row in rows.values():
        assert row.decode[0] <= row.decode[1]
        if row.hits is not None:
            assert row.hits == speed.hit_rates(row.held) and 0 < row.wait < 1


def test_a_speed_by_hand(tmp_path):
    """35B, all in memory: the weights of one token over 0.6 of the bandwidth."""
    (tmp_path / "config.json").write_text(json.dumps(mac.published_config("35B")))
    row = mac.modelled_row(mac.Mac("x", 512, 100.0, 1.0), "35B", tmp_path)
    assert row.held == 1.0 and row.decode[0] == row.decode[1] == pytest.approx(60e9 / 2.4e9, rel=0.15)


def test_it_measures(monkeypatch):
    monkeypatch.setattr(speed, "_PROBE_SECONDS", 0.01)
    found = mac.run_here({"ref": str(demo_folder()), "memory": None, "tokens": 4, "prompt": 20})
    assert found["held"] == 1.0 and found["hits"] is None and found["decode"] > 0 and found["prompt"] > 0
    assert min(found["disk"]) > 0


def test_the_table():
    row = mac.Row("m", "35B", 16e0, 0.25, (0.4, 0.9), (3.0, 3.0), 0.5, None, (1.0, 2.0))
    heads, line, shown = mac.table([row]).splitlines()
    assert heads.count("|") == line.count("|") == shown.count("|") == 10
    assert "| 25% | 40% to 90% | 3.0 | 50% |  | 1.0 to 2.0 |" in shown
