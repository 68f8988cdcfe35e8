"""The benchmark of streaming: its sums, from runs made up, and what it reads when it reads bare."""

import argparse
import os
from pathlib import Path

import pytest

from benchmarks import experts

SIDES = ("ours", "theirs")
AROUND = {"commit": "abc"}


def run(warm: float, cold: float, **more) -> dict:
    return {"warm": {"seconds": warm, "hits": 3, "misses": 1}, "cold": {"seconds": cold, "hits": 3, "misses": 1}} | more


def told(report: experts.Report) -> dict[str, dict]:
    import json

    return {record["quantity"]: record for record in map(json.loads, report.lines)}


def test_what_streaming_costs_is_each_one_less_its_own_resident(capsys):
    results = [
        {
            ("ours", 100, False): run(0.010, 0.010, peak=1), ("theirs", 100, False): run(0.030, 0.030, peak=1),
            ("ours", 25, False): run(0.012, 0.014, peak=2e9), ("theirs", 25, False): run(0.050, 0.070, peak=4e9),
        }
    ] * 2  # fmt: skip
    report = experts.Report(AROUND)
    experts.report_decode(report, results, [25], SIDES)
    found = told(report)
    alone = found["decode, warm, 25 %: streaming alone"]
    assert (alone["ours"]["median"], alone["theirs"]["median"]) == (pytest.approx(2.0), pytest.approx(20.0))
    assert alone["ratio"]["median"] == pytest.approx(10.0) and alone["rounds"] == 2 and alone["commit"] == "abc"
    assert found["decode, cold, 25 %: streaming alone"]["ratio"]["median"] == pytest.approx(10.0)
    assert found["hit rate, 25 %"]["ours"]["median"] == 0.75 and found["memory, 25 %"]["theirs"]["median"] == 4.0


def test_a_prompt_beside_the_least_it_can_take(capsys):
    results = [
        {
            (side, share, cold): {"prompt": {"seconds": seconds * (1 if side == "ours" else 10)}, "peak": 1e9}
            for share, cold, seconds in [(100, False, 4.0), (25, False, 4.5), (25, True, 5.5)]
            for side in SIDES
        }
    ]
    report = experts.Report(AROUND)
    experts.report_prefill(report, "prefill", results, {False: [0.5], True: [1.0]}, SIDES)
    found = told(report)
    assert found["prefill, warm, over resident + bare reading"]["ours"]["median"] == pytest.approx(1.0)
    assert found["prefill, cold, over resident + bare reading"]["ours"]["median"] == pytest.approx(1.1)
    assert found["prefill, cold, 25 %"]["ratio"]["median"] == pytest.approx(10.0)


def test_rounds_are_kept_and_go_on(tmp_path, monkeypatch):
    at = argparse.Namespace(
        source=tmp_path / "model", copy=tmp_path / "copy", repacked=[],
        jobs=lambda share, **job: {side: job | {"side": side, "folder": tmp_path} for side in SIDES},
    )  # fmt: skip
    asked = []
    monkeypatch.setattr(experts, "repack", lambda *_: 7.0)
    monkeypatch.setattr(experts, "run_child", lambda job: asked.append(job["side"]) or {"of": job["seed"]})
    arguments = argparse.Namespace(
        keep=tmp_path / "kept", rounds=1, sides=SIDES, zipf=1.0, settle=1, tokens=1
    )
    for number in range(3):
        at.repacked = []
        results = experts.measure(at, [(25, True)], arguments, 5)
        assert [runs["ours", 25, True] for runs in results] == [{"of": n} for n in range(number + 1)]
        assert at.repacked == [7.0] * (number + 1)
    assert asked == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    at.repacked = []
    assert len(experts.measure(at, [(25, True)], arguments, 6)) == 1  # another measurement


def test_a_layer_is_measured_each_round():
    assert len(experts.measure_layer(2, layers=2, tokens=12)) == 2


@pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the files of this system cannot be forgotten")
def test_bare_reading_reads_every_expert_once(tmp_path: Path, monkeypatch):
    config = experts.synthetic_config(
        "35B", 2, vocab_size=64, hidden_size=64, num_experts=6, moe_intermediate_size=64,
        shared_expert_intermediate_size=64, **experts.SMALL_MIXERS,
    )  # fmt: skip
    folder = experts.write_synthetic(tmp_path / "model", config, plain_trunk=True)
    seen, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda *a: seen.append((*a[::2], len(a[1][0]))) or preadv(*a))
    for cold in (False, True):
        assert experts.bare_read(folder, cold) > 0
        assert sum(size for *_, size in seen) == experts.all_expert_bytes(config) and len(set(seen)) == len(seen)
        seen.clear()
