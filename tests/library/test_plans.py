"""Whatever is asked of `estimate`: a plan that adds up and that `hold` agrees with, or one of this package's errors."""

import json
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import example, given, settings

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import ArgumentError, CheckpointError, Qwen35Error
from mlx_qwen35.generation import prefill
from mlx_qwen35.library import demo_folder, load_model, speed
from mlx_qwen35.library.drafting import drafting_bytes
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.holding import hold
from mlx_qwen35.library.macs import SIZES, kept_by_gpu, mac_for, mac_memory
from mlx_qwen35.library.plan import Plan, parse_size
from tests.checkpoint.foreign import write_fp8
from tests.checkpoints import tiny_config
from tests.conftest import CHECKOUT
from tests.library.test_holding import hollow
from tests.machine import Machine
from tests.soak import examples

CONFIGS = CHECKOUT / "tests" / "facts" / "configs"
MEMORIES = st.one_of(
    st.integers(0, 2**40),
    st.integers(100, 500).map(lambda n: f"{n}MB"),
    st.sampled_from(["24", "24GB", "24 gib", "0.5", "1%", "100%", "0%", "-1GB", "", "much", "1e3"]),
    st.sampled_from([None, 0, -3, 24, 0.5, 1e9]),
)
LENGTHS = st.one_of(
    st.none(), st.integers(-1, 5000), st.sampled_from([4096, 4097, 16384, 262_144, 1_010_000, 10**12, "8k", 4e3, True])
)
ASKED = {
    "memory": MEMORIES,
    "context_length": LENGTHS,
    "yarn": st.booleans(),
    "kv_bits": st.sampled_from([None, None, None, 3, 4, 8, "8"]),
    "kv_group_size": st.sampled_from([64, 64, 32, 48]),
    "quantized_kv_start": st.sampled_from([0, 0, 100, -1]),
    "mtp": st.booleans(),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of all kinds: dense, with experts, with a MTP layer, with as many experts as a token takes, in FP8."""
    root = tmp_path_factory.mktemp("plans")
    made = {
        "dense": hollow(root / "dense", tiny_config("dense", max_position_embeddings=262_144)),
        "moe": hollow(root / "moe", tiny_config("moe", max_position_embeddings=16_384)),
        "all": hollow(root / "all", tiny_config("moe", num_experts=2, num_experts_per_tok=2)),
        "fp8": root / "fp8",
        "demo": demo_folder(),
    }
    write_fp8(made["fp8"], "moe")
    return made


def held_or_error(folder: Path, options: dict[str, Any]) -> Any:
    options = dict(options)
    try:
        bits, size, start = (options.pop(name) for name in ("kv_bits", "kv_group_size", "quantized_kv_start"))
        form = None if bits is None else KVFormat(bits, size, start)
        beside = drafting_bytes(folder, options.pop("mtp"), None)
        return hold(folder, options.pop("memory"), kv_form=form, beside=beside, **options)
    except Qwen35Error as error:
        return error


@pytest.mark.parametrize("kind", ["dense", "moe", "all", "fp8", "demo"])
@settings(max_examples=examples(40))
@given(options=st.fixed_dictionaries(ASKED))
@example(options={"memory": "200MB", "context_length": None, "yarn": False, "kv_bits": None, "kv_group_size": 64,
                  "quantized_kv_start": 0, "mtp": False})  # fmt: skip
def test_a_plan_or_an_error(folders: dict[str, Path], kind: str, options: dict[str, Any]) -> None:
    folder = folders[kind]
    try:
        plan = estimate(folder, **options)
    except Qwen35Error as error:
        assert str(error) and "\n" not in str(error)
        assert isinstance(held_or_error(folder, options), Qwen35Error)
        return
    check(plan)
    held = held_or_error(folder, options)
    if isinstance(held, Qwen35Error):
        assert "does not fit" in str(held)
        assert not plan.fits and (plan.streaming is None or plan.streaming.plan is None)
    elif held.stream is not None:
        assert held.stream == plan.streaming.plan and held.context_length == plan.streaming.context_length
    elif options["memory"] is not None:
        assert plan.fits and plan.context_length == held.context_length


def check(plan: Plan) -> None:
    said = str(plan)
    json.dumps(plan.as_dict())
    assert plan.fits == (plan.missing == 0) == (plan.needed <= plan.memory)
    assert plan.needed >= plan.weights.total + plan.cache + plan.drafting
    assert plan.longest_context <= plan.most_context
    assert plan.streaming is None or not plan.fits
    assert plan.mac is None or (kept_by_gpu(plan.mac) >= plan.needed and f"A Mac with {plan.mac} GB" in said)
    if plan.streaming and plan.streaming.plan:
        slots = plan.streaming.plan.slots
        assert plan.streaming.experts_per_token <= min(slots) and sum(slots) < len(slots) * plan.streaming.num_experts
        assert 0 < plan.streaming.share < 1 and plan.streaming.needed <= plan.memory
        assert plan.streaming.chunk_bytes > 0


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.json")))
def test_published_configs(machine: Machine, name: str) -> None:
    """Every published form, flat and quantized ones too, from config.json alone."""
    (machine.home / "config.json").write_bytes((CONFIGS / f"{name}.json").read_bytes())
    if "Flash" in name:
        with pytest.raises(CheckpointError, match="another architecture"):
            estimate(machine.home, "24GB")
        return
    asked = ({}, {"mtp": True, "kv_bits": 8}, {"context_length": 1_000_000, "yarn": True}, {"bits": 4})
    for memory, more in zip(("2GB", "16GB", "150GB", "1.3TB"), asked, strict=True):
        check(estimate(machine.home, memory, dtype="bfloat16", **more))


def test_the_demo_with_200_megabytes(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts but one fit; a prompt goes in smaller steps, which is what the plan counts on."""
    monkeypatch.setattr(speed, "_ROWS", 256)  # the probe in small
    monkeypatch.setattr(speed, "_PROBE_SECONDS", 0.02)
    assert main(["estimate", "demo", "--memory", "200MB"]) == 0
    assert "All experts but one stay in memory, and a prompt is read" in capsys.readouterr().out
    plan = estimate("demo", "200MB").streaming.plan
    model = load_model(demo_folder(), memory="200MB")
    assert model.prefill_chunk == plan.chunk < 2048
    prefill(model, list(range(1, 300)), model.make_cache())
    assert model.expert_stats is not None
    model.unload()


@pytest.mark.parametrize("size", range(90, 400, 13))
def test_the_demo_with_little(size: int) -> None:
    check(estimate("demo", f"{size}MB"))


def test_what_drafts_counts(machine: Machine) -> None:
    for name in ("Qwen/Qwen3.5-tiny", "me/other"):
        machine.lmstudio(name)
    plain, with_head = estimate("demo", "8GB"), estimate("demo", "8GB", mtp=True)
    tokens = plain.context_length
    assert with_head.drafting == drafting_bytes(demo_folder(), True, None)(tokens)
    assert with_head.needed - plain.needed == with_head.drafting > plain.weights.mtp
    assert "what drafts tokens" in str(with_head) and "not counted" not in str(with_head)
    small = estimate("Qwen/Qwen3.5-tiny", "8GB", draft_model="me/other")
    alone = estimate("me/other", "8GB")
    assert small.drafting == alone.needed - alone.process
    for wrong, says in (
        ({"mtp": True}, "no MTP layer"),
        ({"mtp": True, "draft_model": "me/other"}, "only one can draft"),
        ({"draft_model": "demo"}, "has 1024 tokens, the model it is to draft for"),
        ({"draft_model": "me/no"}, "me/no"),
    ):
        machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(Qwen35Error, match=says):
            estimate("Qwen/Qwen3.5-tiny", "8GB", **wrong)
    assert main(["estimate", "--mtp", "--memory", "8GB"]) == 0


def test_experts_that_have_to_be_converted_first(tmp_path: Path) -> None:
    """Experts in FP8 are not streamed: no plan promises it, and loading says so before it reads."""
    write_fp8(tmp_path / "fp8", "moe")
    whole = estimate(tmp_path / "fp8", "8GB")
    size = whole.needed - whole.working
    plan = estimate(tmp_path / "fp8", f"{size}B")
    assert plan.streaming is None and "convert the model first" in str(plan)
    with pytest.raises(CheckpointError, match="does not fit .* which those of this form cannot"):
        hold(tmp_path / "fp8", f"{size}B")


@pytest.mark.parametrize("wrong, meant", [("24", "24GB"), (24, "24GB"), (0.5, "0.5GB"), ("16384", "16384MB")])
def test_a_unit_that_was_forgotten(wrong: Any, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    for ask in (estimate, lambda memory: hold(demo_folder(), memory)):
        with pytest.raises(ArgumentError, match=f"did you mean '{meant}'"):
            ask(memory=wrong)
    for command in (["estimate", "demo"], ["generate", "-p", "hi"]):
        assert main([*command, "--memory", str(wrong)]) == 2
        assert f"did you mean '{meant}'?" in capsys.readouterr().err


def test_numbers_of_other_types() -> None:
    assert parse_size(24e9) == 24 * 10**9
    for wrong in (float("inf"), float("nan"), -1.5, [], None, "9" * 29 + "GB", "0.0000001KB", 10**30):
        with pytest.raises(ValueError, match="is no size"):
            parse_size(wrong)


def test_macs(capsys: pytest.CaptureFixture[str]) -> None:
    """What a Mac has to give is less than it has."""
    assert all(kept_by_gpu(size) <= 0.75 * 2**30 * size for size in SIZES)
    assert [mac_for(size * 10**9) for size in (1, 6, 17, 18, 25, 380, 500)] == [8, 16, 24, 32, 36, 512, None]
    assert mac_memory(24) == mac_memory("24GB") == mac_memory("24 gib") == (16 * 2**30, mac_memory(24)[1])
    for wrong in ("", "x", "0", True, "24%", "-8GB"):
        with pytest.raises(ValueError, match="give the memory of a Mac"):
            mac_memory(wrong)
    assert main(["estimate", "--mac", "24GB"]) == 0
    said = capsys.readouterr().out
    assert "17.2 GB   what macOS lets the GPU keep of a Mac's 24 GB" in said and "A Mac with 8 GB" in said
    assert "computed in bfloat16" in said  # whatever computes here
    assert estimate(mac=24).weights.total == estimate(dtype="bfloat16").weights.total
    assert estimate(mac=24, dtype="float32").weights.total == estimate(dtype="float32").weights.total
    assert main(["estimate", "--memory", "24GB"]) == 0
    said = capsys.readouterr().out
    assert "more than a Mac with 24 GB has to give, about 17.2 GB: for such a Mac give --mac 24GB" in said
    assert main(["estimate", "--mac", "24GB", "--memory", "24GB"]) == 2
    assert "give one of them" in capsys.readouterr().err
