"""What a ceiling on memory makes of a model: all in memory, experts from the disk, or figures that say why not."""

import json
import math
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import least
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.library import demo_folder, holding, memory
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.holding import hold
from mlx_qwen35.library.plan import parse_size
from mlx_qwen35.sampling import Sampling
from tests.checkpoints import tensor_shapes, tiny_config
from tests.experts.synthetic import LAYERS, synthetic_config

FIGURE = r"[\d.]+ (?:B|KB|MB|GB)"


@pytest.fixture(autouse=True)
def no_mac(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which refuses more memory than it has."""
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)


def hollow(folder: Path, config: dict[str, Any]) -> Path:
    """A checkpoint in bfloat16 whose headers are whole and whose weights are a hole in the file."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in tensor_shapes(config).items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 35B, all 40 layers of it but few words, as far as headers go."""
    config = synthetic_config("35B", LAYERS["35B"], vocab_size=4096)
    for key in ("quantization", "quantization_config"):
        del config[key]
    return hollow(tmp_path_factory.mktemp("large") / "35B", config)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hollow(tmp_path_factory.mktemp("dense") / "tiny", tiny_config("dense", max_position_embeddings=1_000_000))


def needed(folder: Path, tokens: int) -> int:
    """The least memory that experts can be streamed in."""
    config = holding.read_config(folder)
    demand = holding.of_source(holding.open_source(folder, config), holding.compute_dtype(None))
    return sum(least(demand.streamed(tokens)).values())


def test_everything_fits(large: Path) -> None:
    held = hold(large, "400GB")
    assert held.stream is None and held.context_length == 262144
    assert str(held) == "All weights are in memory."
    assert hold(large, "400GB", context_length=5000).context_length == 5000
    assert hold(large, "170GB").stream is None  # a shorter context before streaming
    assert 4096 <= hold(large, "170GB").context_length <= 262144


@pytest.mark.parametrize("size", ["20GB", "60GB"])
def test_experts_are_streamed(large: Path, size: str) -> None:
    held = hold(large, size)
    plan = held.stream
    assert plan.memory == parse_size(size) and held.context_length == 32768
    assert len(plan.slots) == 40 and all(8 <= count <= 256 for count in plan.slots)
    assert max(plan.slots) - min(plan.slots) <= 1
    expert = 3 * 2048 * 512 * 4  # computed in float32 on this device
    assert sum(plan.slots) * expert < plan.memory
    shown = f"{size[:-2]}.0 GB"
    assert re.search(rf"streamed from the disk: {min(plan.slots)}.* up to {shown}; up to 32,768 tokens", str(held))
    assert hold(large, plan.memory).stream == plan  # bytes, and the same again
    more = hold(large, 2 * plan.memory).stream
    assert more is None or min(more.slots) > min(plan.slots)


def test_a_context_that_is_asked_for_is_planned_for(large: Path) -> None:
    short, long = (hold(large, "40GB", context_length=tokens) for tokens in (1000, 262144))
    assert (short.context_length, long.context_length) == (1000, 262144)
    assert sum(short.stream.slots) > sum(long.stream.slots)
    with pytest.raises(CheckpointError, match="allows 262,144 tokens"):
        hold(large, "40GB", context_length=262145)
    with pytest.raises(ValueError, match="context_length is 0"):
        hold(large, "40GB", context_length=0)


def test_the_context_is_halved_before_anything_is_refused(large: Path) -> None:
    for tokens in (32768, 16384, 8192, 4096):
        held = hold(large, needed(large, tokens))
        assert held.stream.slots == (8,) * 40 and held.context_length == tokens
    with pytest.raises(CheckpointError):
        hold(large, needed(large, 8192), context_length=8193)


def test_too_small_says_by_how_much(large: Path) -> None:
    size = needed(large, 4096)
    assert hold(large, size).context_length == 4096
    with pytest.raises(CheckpointError, match="35B does not fit"):
        hold(large, size - 1)
    with pytest.raises(CheckpointError) as refused:
        hold(large, "5GB")
    found = re.fullmatch(
        rf"35B does not fit into the 5.0 GB given as memory: ({FIGURE}) are needed even with the fewest experts in "
        rf"memory and 4,096 tokens of context \((.*)\), ({FIGURE}) more. Give more memory or a smaller context_length, "
        "or take a conversion to fewer bits",
        str(refused.value),
    )
    assert found, refused.value
    assert parse_size(found[1]) == pytest.approx(size, rel=0.01)
    assert parse_size(found[3]) == pytest.approx(size - 5e9, rel=0.1)
    parts = [parse_size(part) for part in re.findall(FIGURE, found[2])]
    assert sum(parts) == pytest.approx(size, rel=0.02) and parts == sorted(parts, reverse=True)
    assert "8 experts a layer" in found[2]


def test_dense_models_under_a_ceiling(dense: Path) -> None:
    whole = hold(dense)
    assert whole.stream is None and whole.context_length is None
    held = hold(dense, "500MB")
    assert held.stream is None and 4096 < held.context_length < 1_000_000
    assert hold(dense, "600MB").context_length > held.context_length
    assert hold(dense, "500MB", context_length=held.context_length).context_length == held.context_length
    message = rf"does not fit into the 500.0 MB given as memory: {FIGURE} are needed with 1,000,000 tokens of context"
    with pytest.raises(CheckpointError, match=rf"tiny {message}, {FIGURE} more"):
        hold(dense, "500MB", context_length=1_000_000)
    with pytest.raises(CheckpointError, match=r"the 20.0 MB given as memory: .* with 32,768|4,096 tokens"):
        hold(dense, "20MB")


class TestSizes:
    @pytest.fixture(autouse=True)
    def machine(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(memory, "installed_memory", lambda: 50 * 10**9)
        monkeypatch.setattr(memory, "free_memory", lambda: 30 * 10**9)

    def test_shares(self, large: Path) -> None:
        assert memory.memory_size("60%") == (30 * 10**9, "60% of the memory of this machine")
        assert memory.memory_size(" 12.5 % ")[0] == 6_250_000_000
        assert memory.memory_size("100%")[0] == 50 * 10**9
        assert hold(large, "60%").stream == hold(large, "30GB").stream
        assert memory.memory_size("24GB") == (24 * 10**9, "given") and memory.memory_size("77B") == (77, "given")

    @pytest.mark.parametrize("wrong", ["0%", "101%", "-5%", "%", "60 percent", "", "0", "x%", "1e3GB"])
    def test_wrong_ones(self, large: Path, wrong: str) -> None:
        with pytest.raises(ValueError, match="is no (size|share of memory)"):
            hold(large, wrong)

    def test_what_is_free_if_nothing_is_said(self, large: Path) -> None:
        assert memory.memory_size(None) == (30 * 10**9, "free on this machine")
        assert hold(large).stream == hold(large, "30GB").stream

    def test_on_a_mac(self, large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(mx.metal, "is_available", lambda: True)
        sizes = {mx.gpu: {"max_recommended_working_set_size": 40 * 10**9, "memory_size": 48 * 10**9}}
        monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: sizes.get(device, {}))  # the CPU is the default
        for size in (None, "100%"):
            assert memory.memory_size(size)[0] == 40 * 10**9
            assert "recommended working set" in memory.memory_size(size)[1]
        sizes[mx.gpu]["max_recommended_working_set_size"] = 5 * 10**9
        with pytest.raises(CheckpointError, match="the 5.0 GB of memory .MLX's recommended working set on this Mac."):
            hold(large)


def test_the_estimate_says_what_will_be_done(large: Path) -> None:
    for size in ("24GB",):
        plan, held = estimate(large, size), hold(large, size)
        streaming = plan.streaming
        assert not plan.fits and streaming.plan == held.stream and streaming.context_length == held.context_length
        assert streaming.pool == sum(held.stream.slots) * streaming.expert_bytes[0]
        assert streaming.share == pytest.approx(sum(held.stream.slots) / (40 * 256))
        assert streaming.token_bytes == 8 * 40 * streaming.expert_bytes[0]
        assert streaming.chunk_bytes == 256 * 40 * streaming.expert_bytes[0]
        assert streaming.needed == needed(large, held.context_length)
        said = str(plan)
        assert "Experts are streamed from the disk, with up to 32,768 tokens:" in said
        assert f"{min(held.stream.slots)} or {max(held.stream.slots)} of 256" in said or "of 256 experts" in said
        record = json.loads(json.dumps(plan.as_dict()))["streaming"]
        assert record["plan"]["slots"] == list(held.stream.slots) and record["pool"] == streaming.pool
    small = estimate(large, "5GB")
    assert small.streaming.plan is None and small.streaming.pool == 0
    nor = rf"Nor with experts streamed from the disk: ({FIGURE}) are needed with 8 experts .* ({FIGURE}) more"
    lack = re.search(nor, str(small))
    assert parse_size(lack[1]) == pytest.approx(needed(large, 4096), rel=0.01)
    assert estimate(large, "400GB").streaming is None


DEMO_LEAST = 4096  # tokens: all that the demo has


def test_the_demo_under_a_ceiling() -> None:
    """load() under a ceiling gives the same answers, streamed, and says what it did."""
    size = needed(demo_folder(), DEMO_LEAST) + 4_000_000
    whole, processor = mlx_qwen35.load(memory="8GB")
    model, bounded = mlx_qwen35.load(memory=size)
    assert whole.expert_stats is None and model.expert_stats is not None
    assert bounded.context_length == DEMO_LEAST
    answers = [
        [part.token for part in stream_generate(m, p, "Sort: dog, cat, ant", max_tokens=12, sampling=Sampling())]
        for m, p in ((whole, processor), (model, bounded))
    ]
    assert answers[0] == answers[1] and model.expert_stats.misses
    model.unload()
    model = mlx_qwen35.load_model(demo_folder(), memory=size, context_length=1000)
    assert model.config.text.max_position_embeddings == 1000
    logits = [np.array(m(mx.array([[5, 6, 7]]))) for m in (whole, model)]
    np.testing.assert_array_equal(*logits)
    with pytest.raises(CheckpointError, match="demo does not fit into the 50.0 MB given as memory"):
        mlx_qwen35.load(memory="50MB")


def test_the_command_under_a_ceiling(capsys: pytest.CaptureFixture[str]) -> None:
    size = str(needed(demo_folder(), DEMO_LEAST) + 4_000_000)
    ask = ["generate", "-p", "Sort: dog, cat, ant", "-n", "12", "--temp", "0"]
    assert main(ask) == 0
    whole = capsys.readouterr()
    assert main([*ask, "--memory", size]) == 0
    bounded = capsys.readouterr()
    assert bounded.out == whole.out
    assert "Experts are streamed from the disk" in bounded.err and "streamed" not in whole.err
    for wrong, message in (("50MB", "does not fit into the 50.0 MB"), ("lots", "is no size"), ("0%", "no share of")):
        assert main([*ask, "--memory", wrong]) == 2
        assert message in capsys.readouterr().err
