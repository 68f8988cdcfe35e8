"""3.6 and 3.8 by their names: what is said of each before a download, and the form of the largest, in small."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.cli.main import main
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library import find, hold
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.listing import list_models
from mlx_qwen35.library.suggesting import PUBLISHED
from tests.checkpoint.foreign import FP8, write_fp8
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.fake_hub import Hub
from tests.machine import Machine
from tests.published import CONFIGS

LARGEST = "Qwen/Qwen3.8-2.4T-A95B"
# Qwen3.8-2.4T-A95B in small: what is said of it, its 512 experts and its ratios of heads are its own.
SIZES = {
    "hidden_size": 64, "head_dim": 16, "num_attention_heads": 32, "num_key_value_heads": 2,
    "linear_num_key_heads": 2, "linear_num_value_heads": 16, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 512, "num_experts_per_tok": 10,
    "rope_parameters": {"mrope_section": [2, 1, 1]}, "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False, "dtype": "bfloat16",
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
}  # fmt: skip
TOKENS = mx.array([[3, 8, 1, 60, 22, 7, 19, 41]])
PLAN = StreamPlan((14, 14), group=10, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)


def offered(hub: Hub, name: str, **more: object) -> None:
    config = json.loads((CONFIGS / f"{name.partition('/')[2].removesuffix('-FP8')}.json").read_text()) | more
    hub.repositories[name] = {"config.json": json.dumps(config).encode(), "model.safetensors": b""}


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "3.5" not in name])
def test_before_a_download(machine: Machine, hub: Hub, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """As many parameters as the name says, and no weight is asked for."""
    offered(hub, name)
    said = name.rpartition("Qwen3.")[2].split("-")[1]
    billions = float(said[:-1]) * {"B": 1, "T": 1000}[said[-1]]
    plan = estimate(name, mac="512GB")
    assert plan.parameters == pytest.approx(billions * 1e9, rel=0.02) and plan.most_context == 262_144
    assert plan.quantization == "not quantized" and plan.weights.total == pytest.approx(2 * plan.parameters, rel=1e-3)
    assert bool(plan.weights.vision) == (name != LARGEST) and bool(plan.weights.experts) == ("-A" in name)
    assert main(["estimate", name, "--mac", "24GB", "--q-bits", "4", "--mtp"]) == 0
    assert name in capsys.readouterr().out and set(hub.gets) == {"config.json"}


def test_the_largest_streams_its_512_experts(machine: Machine, hub: Hub) -> None:
    """At 4 bits from a disk of 1.5 TB, on a Mac with 128 GB; from its own FP8, which has to be converted, not."""
    offered(hub, LARGEST)
    offered(hub, f"{LARGEST}-FP8", quantization_config=FP8)
    plan = estimate(LARGEST, mac="128GB", bits=4)
    assert plan.streaming.plan and (plan.streaming.num_experts, plan.streaming.experts_per_token) == (512, 10)
    assert len(plan.streaming.plan.slots) == 92 and 10 <= min(plan.streaming.plan.slots) < 512 and plan.mac is None
    assert 1.4e12 < plan.weights.total < 1.6e12
    eight = estimate(f"{LARGEST}-FP8", mac="512GB")
    assert eight.quantization == "fp8" and eight.streaming is None and not eight.streamable
    assert "convert the model first" in str(eight) and eight.converted.streaming.plan
    assert estimate(LARGEST, mac="128GB", mtp=True).drafting > 0


@pytest.fixture
def largest(tmp_path: Path) -> Path:
    """In bfloat16: flat, an own tensor for each expert, an MTP layer, no tower."""
    config = tiny_config("moe", flat=True, **SIZES)
    assert config["model_type"] == "qwen3_5_moe_text" and "vision_config" not in config
    tensors = random_tensors(config, 2)
    return write_checkpoint(tmp_path / "largest", config, tensors, layout="hf-per-expert", dtype="bfloat16")


def test_its_form_streams_what_it_computes(largest: Path, tmp_path: Path) -> None:
    """As published and at 4 bits: bit for bit what all experts in memory give, for prompts and for single tokens."""
    folders = largest, convert(largest, tmp_path / "four", bits=4, group_size=32, recipe="uniform")
    for folder in folders:
        resident, streamed = load_model(folder), load_model(folder, stream=PLAN)
        for tokens in (TOKENS, TOKENS[:, :1]):
            assert mx.array_equal(streamed(tokens), resident(tokens)).item()
        caches = [model.make_cache() for model in (resident, streamed)]
        for token in TOKENS[0].tolist():
            one, other = (m(mx.array([[token]]), c) for m, c in zip((resident, streamed), caches, strict=True))
            assert mx.array_equal(one, other).item()
        assert load_mtp(folder, resident.config) is not None
    held = hold(largest, "260MB", context_length=64)
    assert held.stream is None or min(held.stream.slots) >= 10


def test_its_fp8_is_exact_and_streams_once_converted(tmp_path: Path) -> None:
    meant = write_fp8(tmp_path / "eight", layout="hf-per-expert", flat=True, **SIZES | {"mtp_num_hidden_layers": 0})
    config = json.loads((tmp_path / "eight/config.json").read_text())
    config.pop("quantization_config")
    write_checkpoint(tmp_path / "plain", config, meant)
    found, due = (load_model(tmp_path / name)(TOKENS) for name in ("eight", "plain"))
    assert mx.abs(found - due).max().item() <= 2e-3 < 0.1 < np.abs(np.array(due)).max()
    with pytest.raises(CheckpointError, match="cannot be streamed as they are"):
        load_model(tmp_path / "eight", stream=PLAN)
    four = convert(tmp_path / "eight", tmp_path / "four", bits=4, group_size=32, recipe="uniform")
    assert mx.array_equal(load_model(four, stream=PLAN)(TOKENS), load_model(four)(TOKENS)).item()


def test_flash_next_is_refused_in_a_line(machine: Machine, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """By name, before anything else of it is fetched, and where it lies here."""
    name = "Qwen/Qwen3.8-Flash-Next"
    offered(hub, name)
    for command in (["generate", "--model", name, "-p", "x"], ["estimate", name], ["convert", name, "out", "-q"]):
        assert main(command) == 2
        said = capsys.readouterr().err.strip().splitlines()[-1]
        assert "Qwen3.8-Flash-Next is another architecture than Qwen3.5 to 3.8" in said and "use mlx-vlm for it" in said
    assert set(hub.gets) == {"config.json"}
    folder = machine.home / ".lmstudio/models" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_bytes(hub.repositories[name]["config.json"])
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    assert [model.name for model in list_models()] == ["demo"]
    with pytest.raises(CheckpointError, match="use mlx-vlm for it"):
        find(name)
