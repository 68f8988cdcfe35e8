"""How fast it will be: sums by hand, probes that read what they say, and hit rates that are those of the study."""

import json
import os
from pathlib import Path

import pytest

from mlx_qwen35.cli.main import main
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.layout import Extent, LayerLayout, Tensor
from mlx_qwen35.experts.streamed import POLICY
from mlx_qwen35.library import estimating, speed
from mlx_qwen35.library.estimating import estimate
from tests.conftest import CHECKOUT
from tests.machine import checkpoint


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_PROBE_SECONDS", 0.01)
    monkeypatch.setattr(speed, "_ROWS", 256)


def test_hit_rates_are_those_of_the_study() -> None:
    drawn = json.loads((CHECKOUT / "benchmarks/results/replay.json").read_text())["policies"]["found"]["drawn"]
    for share, least, most in speed.HITS[1:-1]:
        rates = [trace["hit_rate"][f"{share:.3f}"][POLICY.upper()] for trace in drawn]
        assert (least, most) == (pytest.approx(min(rates), abs=0.005), pytest.approx(max(rates), abs=0.005))
    assert {share for share, *_ in speed.HITS} == {0.0, 1.0, *(float(at) for at in drawn[0]["hit_rate"])}


def test_hit_rates_between() -> None:
    assert speed.hit_rates(0.0) == (0.0, 0.0) and speed.hit_rates(1.0) == speed.hit_rates(1.2) == (1.0, 1.0)
    shares = [n / 100 for n in range(101)]
    for each in zip(*map(speed.hit_rates, shares), strict=True):
        assert list(each) == sorted(each)
    at, least, most = speed.HITS[2]
    assert speed.hit_rates(at) == pytest.approx((least, most))


def test_sums_by_hand() -> None:
    sizes = {"token_bytes": 100, "chunk_bytes": 3000, "active_bytes": 500}
    speeds = {"disk": 50.0, "disk_deep": 100.0, "device": 250.0}
    told = speed.expected(share=1.0, layers=4, **sizes, **speeds)
    assert told.tokens == (pytest.approx(1 / (2 + 4 * speed.LAYER_SECONDS)),) * 2 and told.chunk_seconds == 30
    cold = speed.expected(share=0.0, layers=0, **sizes, **speeds)
    assert cold.tokens == (1 / 4, 1 / 4) and cold.hits == (0.0, 0.0)


def test_the_disk_is_read_where_experts_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "experts"
    path.write_bytes(bytes(5000))
    tensor = Tensor("gate_proj.weight", "U8", (100,))
    layouts = {n: LayerLayout(n, 10, (tensor,), ((Extent(path, 1000 * n, 100),),), (100,)) for n in (1, 3)}
    seen, preadv = [], os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, b, at: seen.append((at, len(b[0]))) or preadv(fd, b, at))
    closed, close = [], os.close
    monkeypatch.setattr(os, "close", lambda fd: closed.append(fd) or close(fd))
    shallow, deep = speed.disk_speed(layouts, 3)
    assert shallow > 0 and deep > 0 and len(closed) == 1
    assert {at for at, _ in seen} <= {1000 * n + 100 * e for n in (1, 3) for e in range(10)}
    assert len(seen) >= 3 + 3 + 24  # to begin with, of one token, of many
    assert {size for _, size in seen} == {100}
    path.unlink()
    with pytest.raises(OSError):
        speed.disk_speed(layouts, 3)


def test_what_the_command_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "model", kind="moe")
    memory = estimate(folder, context_length=256).needed - 50_000
    # So small a model takes more when it is streamed, by threads and spare buffers: it is said to fit.
    text = ModelConfig.from_folder(folder).text
    plan = StreamPlan((text.moe.num_experts - 1,) * text.num_hidden_layers, 2, 64, 64, 1 << 24, memory)
    monkeypatch.setattr(estimating, "streamed", lambda *_: (256, plan))
    assert estimate(folder, memory, 256).streaming.expected is None  # who asks in Python asks for it
    asked = ["estimate", str(folder), "--context-length", "256", "--memory", str(memory)]
    assert main(asked) == 0
    said = capsys.readouterr().out
    assert "Modelled, not measured" in said and "tokens a second, if" in said and "GB/s" in said
    assert main([*asked, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["streaming"]["expected"]
    assert told["modelled"] and 0 < told["tokens"][0] <= told["tokens"][1] and told["disk"] > 0 < told["device"]
    assert main([*asked, "--no-probe"]) == 0
    assert "Modelled" not in capsys.readouterr().out


@pytest.mark.parametrize("forgets", [True, False])
def test_it_is_said_where_memory_may_have_answered(monkeypatch: pytest.MonkeyPatch, forgets: bool) -> None:
    """As on macOS, which lets no program empty the page cache."""
    monkeypatch.setattr(speed, "can_forget", lambda: forgets)
    sizes = {"token_bytes": 100, "chunk_bytes": 3000, "active_bytes": 500}
    told = speed.expected(share=0.5, layers=4, **sizes, disk=50.0, disk_deep=100.0, device=250.0)
    assert told.as_dict()["from_memory"] is not forgets
    assert any("system's memory" in line for line in told.lines(64)) is not forgets
