"""benchmarks/sessions.py with a chat of two turns: both sides go through it, and the counts add up."""

import json

import pytest

from benchmarks import chat_script, sessions


def test_two_turns(monkeypatch, tmp_path, capsys):
    pytest.importorskip("mlx_lm", reason="mlx-lm is not installed")
    monkeypatch.setattr(chat_script, "TURNS", 2)
    sessions.play(tmp_path, check=True)
    assert "every argmax the same" in capsys.readouterr().out
    script = json.loads((tmp_path / "script.json").read_text())
    assert len(script) == 3 and all(turn["answer"] for turn in script)  # the second asks a tool
    found = {}
    for side in ("ours", "mlx-lm"):
        sessions.run(side, tmp_path)
        found[side] = json.loads(capsys.readouterr().out)
    fewest = len(script[0]["tokens"])
    for counts in found.values():
        assert fewest <= counts["computed"] - counts["again"] <= sum(len(turn["tokens"]) for turn in script)
        assert counts["held"] > 0 and counts["all"] >= counts["first"] > 0
    assert found["ours"]["again"] < 10
