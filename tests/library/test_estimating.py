"""What a model is said to take, against what it takes; and what is said to fit."""

import gc
import json
import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_qwen35
from mlx_qwen35.cache.kv import STEP
from mlx_qwen35.cli.main import main
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.generation import prefill
from mlx_qwen35.library import estimating, find, footprint, holding, load_model
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.plan import parse_size
from mlx_qwen35.model.model import PREFILL_CHUNK
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.fake_hub import Hub
from tests.machine import Machine, checkpoint, gguf
from tests.published import published_config

QUANTIZABLE = {
    "hidden_size": 256, "intermediate_size": 512, "linear_num_value_heads": 8, "linear_value_head_dim": 32,
    "linear_key_head_dim": 32, "linear_num_key_heads": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 512,
}  # fmt: skip
DEEP = QUANTIZABLE | {
    "intermediate_size": 1536, "num_hidden_layers": 8,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
}  # fmt: skip
PUBLISHED = ["0.8B", "2B", "4B", "9B", "27B", "35B-A3B", "122B-A10B", "397B-A17B"]


def a_checkpoint(kind: str, folder: Path) -> Path | None:
    if kind == "demo":
        return None
    if kind in ("dense", "moe"):
        return checkpoint(folder, kind=kind)
    source = checkpoint(folder.with_name("source"), text=DEEP if kind == "deep" else QUANTIZABLE)
    mode = "mxfp4" if kind == "mxfp4" else "affine"
    return convert(source, folder, bits=4, mode=mode, recipe="uniform")


@pytest.mark.parametrize("kind", ["demo", "dense", "moe", "4-bit", "mxfp4", "deep"])
def test_against_what_is_measured(tmp_path: Path, kind: str) -> None:
    """Weights within 1 %, the cache exactly, the prompt from 1 to 4 times what it takes.

    deep: of a short prompt the most is weights that the CPU has unpacked, of one layer or several at once: that depends
    on how far MLX allocates ahead of its work, so that up to 8 times are allowed where weights are unpacked.
    """
    most = 4 if kind in ("demo", "dense", "moe") else 8
    ref = a_checkpoint(kind, tmp_path / "model")
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    model = load_model(find(ref))
    gc.collect()
    weights = mx.get_active_memory() - before
    for tokens in (100, 700):
        plan = estimate(ref, context_length=tokens)
        assert plan.weights.total == pytest.approx(weights, rel=0.01)
        mx.clear_cache()
        base = mx.get_active_memory()
        mx.reset_peak_memory()
        cache = model.make_cache()
        mx.eval(prefill(model, [1 + at % 50 for at in range(tokens)], cache))
        peak = mx.get_peak_memory() - base
        assert plan.cache == cache.nbytes
        assert peak <= plan.cache + plan.working <= most * peak


def test_half_precision(tmp_path: Path) -> None:
    """Decays stay float32, everything else is cast."""
    folder = checkpoint(tmp_path / "model")
    model = load_model(folder, dtype="float16")
    held = sum(array.nbytes for _, array in tree_flatten(model.parameters()))
    assert estimate(folder, dtype="float16").weights.total == held
    cache = model.make_cache()
    mx.eval(prefill(model, [1, 2, 3], cache))
    assert estimate(folder, context_length=3, dtype="float16").cache == cache.nbytes


@pytest.mark.parametrize("limit", [0, 1, 2, 7, 99, 100, 101])
def test_the_search_for_the_longest(limit: int) -> None:
    assert holding._longest(lambda tokens: tokens, limit, 100) == min(limit, 100)


def test_sizes_that_belong_to_others() -> None:
    assert (footprint.CHUNK_SIZE, footprint.CACHE_STEP) == (PREFILL_CHUNK, STEP)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(tmp_path: Path, name: str) -> None:
    """From config.json alone: the parameters that the name says, and 4 bits in a quarter and a bit."""
    config = published_config(f"Qwen3.5-{name}")
    (tmp_path / "config.json").write_text(json.dumps(config))
    plan = estimate(tmp_path, "600GB", dtype="bfloat16")
    billions = float(name.split("B")[0])
    assert plan.parameters == pytest.approx(billions * 1e9, rel=0.15)
    assert plan.weights.total == pytest.approx(2 * plan.parameters, rel=0.001)
    assert (plan.weights.experts > 0.8 * plan.weights.total) == ("-A" in name)
    assert 0.26 < plan.converted.weights.total / plan.weights.total < 0.5
    assert plan.quantization == "not quantized" and plan.dtype == "bfloat16"
    # 35B: 10 attention layers x 2 x 2 heads x 256 x 2 bytes
    assert name != "35B-A3B" or plan.cache_per_token == 20480


def test_the_longest_context_is_the_longest(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model", text={"max_position_embeddings": 1_000_000})
    plan = estimate(folder, "500MB")
    assert plan.fits and plan.missing == 0 and plan.context_length == plan.longest_context
    assert 4096 < plan.longest_context < plan.most_context == 1_000_000
    longer = estimate(folder, "500MB", plan.longest_context + 1)
    assert not longer.fits and longer.longest_context == plan.longest_context
    assert longer.missing == longer.needed - 5 * 10**8 > 0
    assert "do not fit" in str(longer) and f"up to {plan.longest_context:,} tokens do" in str(longer)
    assert estimate(folder, plan.needed).longest_context >= plan.longest_context
    more = estimate(folder, "510MB")
    assert more.longest_context > plan.longest_context


def test_what_does_not_fit_at_all(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "model")
    plan = estimate(folder, "1000B")
    assert not plan.fits and plan.longest_context == 0 and plan.context_length == 4096
    assert plan.missing == plan.needed - 1000
    assert re.search(r"Does not fit: \d.* more memory is needed for 4,096 tokens", str(plan))


def test_the_memory_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = estimate()
    assert plan.memory > 2**28 and plan.memory_source
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    sizes = {mx.gpu: {"max_recommended_working_set_size": 17 * 2**30}}
    monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: sizes.get(device, {}))  # the CPU is the default
    assert estimate().memory == 17 * 2**30
    assert "recommended working set" in str(estimate())


def test_as_converted(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "source", text=QUANTIZABLE)
    four = convert(source, tmp_path / "four", bits=4)
    plan = estimate(source)
    assert plan.converted.weights == estimate(source, bits=4).weights == estimate(four).weights
    assert estimate(source, bits=8).weights.total > estimate(source, bits=4).weights.total
    assert estimate(four).converted is None  # it is what it would be
    assert "mlx-qwen35 convert" in str(plan) and "mlx-qwen35 convert" not in str(estimate(four))


def test_the_demo_says_everything() -> None:
    plan = estimate(memory="8GB")
    said = str(plan)
    for word in ("demo", "experts", "trunk", "embedding", "vision", "MTP", "a token", "memory", "given", "Fits"):
        assert word in said
    assert plan.weights.mtp > 0  # on the disk, and no part of what is needed
    assert plan.weights.total == sum((plan.weights.experts, plan.weights.trunk, plan.weights.embedding,
                                      plan.weights.vision))  # fmt: skip
    assert plan._repr_html_() == f"<pre>{said}</pre>"
    assert replace(plan, name="<b>")._repr_html_().startswith("<pre>&lt;b&gt;")


def test_from_the_hub_without_a_download(machine: Machine, hub: Hub) -> None:
    source = checkpoint(machine.home / "source", text=QUANTIZABLE)
    four = convert(source, machine.home / "four", bits=4)
    for name, folder in (("Qwen/Qwen3.5-tiny", source), ("me/Qwen3.5-tiny-4bit", four)):
        hub.publish(name, folder)
        assert estimate(name).weights == estimate(folder).weights
    assert hub.gets == ["config.json"] * 2
    assert not (machine.home / ".cache").exists()
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="HF_HUB_OFFLINE"):
        estimate("Qwen/Qwen3.5-tiny")


def test_an_incomplete_download_will_do(machine: Machine) -> None:
    whole = machine.lmstudio("me/whole", shards=2)
    cut = machine.cached("me/cut", shards=2)
    (cut / "model-00002-of-00002.safetensors").unlink()
    assert estimate(cut).weights == estimate(whole).weights


def test_refusals(machine: Machine) -> None:
    folder = checkpoint(machine.home / "model")
    for memory in ("much", "", "24 i", "-3GB", "0", 0, -1, True, "1e9"):
        with pytest.raises(ValueError, match="is no size"):
            estimate(folder, memory)
    for context in (0, -1, 4097):
        with pytest.raises(ValueError, match="at most 4096|allows 4,096 tokens"):
            estimate(folder, context_length=context)
    with pytest.raises(CheckpointError, match="no affine quantization"):
        estimate(folder, bits=7)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="has 1 bytes"):
        estimate(folder)
    with pytest.raises(CheckpointError, match="model-Q4_K_M.gguf ends early"):
        estimate(gguf(machine.home / "gguf"))


@pytest.mark.parametrize(
    "text, size",
    [("24GB", 24e9), ("24 GiB", 24 * 2**30), ("1.5g", 1.5e9), ("100", 100), ("2tb", 2e12), ("7kb", 7000), (5, 5)],
)
def test_sizes(text: str | int, size: float) -> None:
    assert parse_size(text) == size


def test_the_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.lmstudio("me/Qwen3.5-tiny")
    assert main(["estimate", "qwen3.5-tiny", "--memory", "1GB", "--context-length", "1000"]) == 0
    assert "needed" in capsys.readouterr().out
    assert main(["estimate", "qwen3.5-tiny", "--memory", "1GB", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["memory"] == 10**9 and record["fits"] and record["weights"]["total"] > record["weights"]["trunk"]
    assert record["converted"]["weights"]["total"]
    for wrong in (["--memory", "lots"], ["--context-length", "0"], ["--q-bits", "7"]):
        assert main(["estimate", "qwen3.5-tiny", *wrong]) == 2
        assert capsys.readouterr().err.startswith("error: ")
    assert main(["estimate", "qwen3.5-none"]) == 2


def test_no_weight_is_read(machine: Machine) -> None:
    folder = checkpoint(machine.home / "model", kind="moe")
    machine.monkeypatch.setattr("mlx_qwen35.checkpoint.files.read", lambda *a, **k: pytest.fail("a weight is read"))
    assert estimate(folder).weights.total
    assert mlx_qwen35.estimate is estimating.estimate


@pytest.mark.parametrize("tool, kind", [("fp8", "dense"), ("fp8", "moe"), ("gptq", "dense"), ("gptq", "moe")])
def test_what_other_tools_quantized(tmp_path: Path, tool: str, kind: str) -> None:
    """FP8 takes what it becomes, GPTQ what it is; config.json alone says the same of them."""
    folder = tmp_path / "model"
    {"fp8": write_fp8, "gptq": write_gptq}[tool](folder, kind)
    held = sum(array.nbytes for _, array in tree_flatten(load_model(folder).parameters()))
    plan = estimate(folder)
    assert plan.weights.total == held
    assert plan.quantization == {"fp8": "fp8", "gptq": "gptq 4-bit"}[tool]
    (folder / "model.safetensors").unlink()
    assert estimate(folder).weights.total == pytest.approx(held, rel=0.01)
