"""What is made of figures: sums, turns, the bounds modelled from counts, and the table."""

from pathlib import Path

import pytest

from benchmarks import bench, geometry, measuring, report, roofline
from benchmarks.launches import Count
from tests.published import published_config


def test_sides_take_turns_and_the_first_changes() -> None:
    order = []
    sides = [lambda n=name: order.append(n) or len(order) for name in "ab"]
    rounds = measuring.in_turns(sides, 3)
    assert "".join(order) == "baabbaab"
    assert rounds == [(3, 4), (6, 5), (7, 8)]  # the warm-up is thrown away


def test_the_ratio_is_formed_round_by_round() -> None:
    made = measuring.compared("decode", "a token", "s", [(1.0, 2.0), (2.0, 4.0), (4.0, 12.0)], case="x")
    assert made["ratio"] == {"median": 2.0, "min": 2.0, "max": 3.0}
    assert made["ours"]["median"] == 2.0 and made["case"] == "x"
    assert measuring.spread(made["ratio"], ".1f") == "2.0 [2.0 .. 3.0]"


def test_lines_are_appended_with_their_circumstances(tmp_path: Path) -> None:
    out = tmp_path / "new" / "lines"
    for number in range(2):
        measuring.write([{"a": number}], {"commit": "c"}, out)
    assert bench.read(out) == [{"a": 0, "commit": "c"}, {"a": 1, "commit": "c"}]
    assert bench.read(tmp_path / "none") == []


def test_bounds_follow_from_bytes_and_launches() -> None:
    found = Count(launches=1000, moved=2 * 10**9, asked=2 * 10**9, bound=10**9, held=90 * 2**30, by_kind={}, times={})
    assert roofline.bound(found, 100) == pytest.approx(100)
    assert roofline.modelled(found, 100, 0) == pytest.approx(50)
    assert roofline.modelled(found, 100, 5e-6) == pytest.approx(1 / 0.025)
    rows = roofline.rows({"ours": found})
    large = ["M1 Ultra", "M2 Ultra", "M3 Max", "M3 Ultra", "M4 Max", "M5 Max"]  # 90 of at least 128 GiB
    assert [row["chip"] for row in rows] == large
    assert all(row["ours"][0] < row["ours"][1] <= row["bound"] for row in rows)


AROUND = {
    "machine": "M", "device": "cpu", "python": "3", "mlx": "1", "mlx_lm": "2", "mlx_vlm": None, "openblas": "Haswell",
    "commit": "abc", "date": "today", "load_before": 0.25,
}  # fmt: skip


def test_the_table_says_what_was_measured_counted_and_modelled(tmp_path: Path) -> None:
    compared = measuring.compared("prefill", "prefill 512", "s", [(1.0, 12.0)], case="0.8B", cut="cut", peer="mlx-lm")
    moved = {"bytes": 103, "bytes_bound": 100}
    launches = [
        {"benchmark": "launches", "size": "27B", "side": side, "context": 9, "launches": n} | moved
        for side, n in (("ours", 500), ("mlx-lm", 2000))
    ]
    chip = {"benchmark": "roofline", "size": "27B", "gaps": [1e-6, 5e-6], "chip": "M4 Max", "bandwidth": 546,
            "bound": 36.4, "ours": [30.0, 33.0], "mlx-lm": [20.0, 25.0]}  # fmt: skip
    trouble = {"benchmark": "memory", "trouble": "stopped: it had not ended after 300 s"}
    records = [record | AROUND for record in (compared, *launches, chip)] + [trouble]
    text = report.markdown(records)
    assert "| prefill 512 | 0.8B (cut) | mlx-lm | 1 |" in text and "12.00 [12.00 .. 12.00] |" in text
    assert "| 27B | 500 | 2,000 | 0.25 |" in text and "3.0% |" in text
    assert "| 27B | M4 Max | 546 | 36 | 30 .. 33 | 20 .. 25 |" in text
    assert "from other work: 0.2 to 0.2." in text
    assert "**memory**: stopped" in text and "commit abc" in text and "No Mac was measured" in text
    if report.draw(records, tmp_path):
        names = ("bench-compared.png", "bench-launches.png", "bench-roofline.png")
        assert {file.name for file in tmp_path.iterdir()} == set(names)


def test_a_benchmark_that_does_not_end_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/slow.py").write_text("import time; time.sleep(60)")
    (tmp_path / "benchmarks/bad.py").write_text("raise SystemExit(3)")
    (tmp_path / "benchmarks/good.py").write_text("import sys; open(sys.argv[2], 'a').write('{}')")
    monkeypatch.setattr(bench, "CHECKOUT", tmp_path)
    out = tmp_path / "out"
    assert "had not ended after 0 s" in bench.run(bench.Step("slow", (), 0.2), out)
    assert bench.run(bench.Step("bad", (), 60), out) == "left with status 3"
    assert bench.run(bench.Step("good", (), 60), out) is None and bench.read(out) == [{}]


def test_sizes_are_the_published_ones() -> None:
    for size in geometry.SIZES:
        published = published_config(f"Qwen3.5-{size}")["text_config"]
        ours = geometry.config(size)["text_config"]
        differing = {key for key in published if key in ours and published[key] != ours[key]}
        assert not differing - {"rope_parameters", "mtp_num_hidden_layers"}, f"{size}: {differing}"
