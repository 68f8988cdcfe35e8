"""GPTQ checkpoints: the same integers in MLX's order, and what does not fit together is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import open_folder, read
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion import task
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import Written, write_gptq
from tests.checkpoint.test_fp8 import TOKENS, assert_mlx_lm_agrees, fused, published, put, spoil
from tests.checkpoint.test_quantized import dequantized
from tests.checkpoints import write_checkpoint

FORMS: dict[str, dict[str, Any]] = {
    "as published": {}, "newer format": {"checkpoint_format": "gptq_v2"}, "8 bits": {"bits": 8}, "2 bits": {"bits": 2},
    "bfloat16 scales": {"tag": "BF16"}, "without g_idx": {"order": False},
}  # fmt: skip


def same_values(folder: Path, meant: dict[str, np.ndarray]) -> None:
    found, values = dequantized(load_model(folder, dtype="float32")), published(meant)
    assert found.keys() == values.keys()
    assert all(np.array_equal(np.array(found[name].astype(mx.float32)), value) for name, value in values.items())


@pytest.mark.parametrize("form", FORMS)
def test_load(tmp_path: Path, form: str) -> None:
    meant = write_gptq(tmp_path / "a", **FORMS[form])
    same_values(tmp_path / "a", meant)
    experts = load_model(tmp_path / "a").layers[0].mlp.experts
    assert (experts.up_proj.bits, experts.up_proj.group_size) == (FORMS[form].get("bits", 4), 32)


def test_load_dense(tmp_path: Path) -> None:
    meant = write_gptq(tmp_path / "a", "dense")
    same_values(tmp_path / "a", meant)
    assert "scales" not in load_model(tmp_path / "a").layers[1].self_attn.q_proj


def test_logits(tmp_path: Path) -> None:
    """Those of the dequantized weights."""
    meant = write_gptq(tmp_path / "a")
    config = json.loads((tmp_path / "a/config.json").read_text())
    del config["quantization_config"]
    other = load_model(write_checkpoint(tmp_path / "b", config, fused(meant)))(TOKENS)
    found = load_model(tmp_path / "a", dtype="float32")(TOKENS)
    assert mx.abs(found - other).max().item() <= 2e-3 and mx.abs(other).max().item() > 0.1


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("bits", [4, 8])
def test_integers_are_carried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bits: int) -> None:
    """At their own bits and in their own groups, whatever groups the rest gets; in small pieces too."""
    meant = published(write_gptq(tmp_path / "a", kind, bits=bits))
    monkeypatch.setattr(task, "PIECE_BYTES", 10_000)
    out = convert(tmp_path / "a", tmp_path / "b", bits=bits, group_size=64, dtype="float32")
    found = dequantized(load_model(out))
    for name in ("gate_proj", "up_proj", "down_proj"):
        ours = f"layers.1.mlp.{'experts.' if kind == 'moe' else ''}{name}.weight"
        assert np.array_equal(np.array(found[ours]), meant[ours])
    config = json.loads((out / "config.json").read_text())["quantization"]
    path = f"language_model.model.layers.1.mlp.{'switch_mlp.' if kind == 'moe' else ''}up_proj"
    first = {key: config[key] for key in ("group_size", "bits", "mode")}  # of all that have no entry of their own
    assert config.get(path, first) == {"group_size": 32, "bits": bits, "mode": "affine"}
    kept = open_folder(convert(tmp_path / "a", tmp_path / "c", bits=bits)).entries[f"{path}.scales"]
    assert kept.dtype == "F16"


def test_other_targets_start_from_the_exact_values(tmp_path: Path) -> None:
    meant = published(write_gptq(tmp_path / "a"))
    name = "layers.0.mlp.experts.up_proj.weight"
    plain = load_model(convert(tmp_path / "a", tmp_path / "b", bits=None, dtype="float32"))
    assert np.array_equal(np.array(dequantized(plain)[name]), meant[name])
    out = convert(tmp_path / "a", tmp_path / "c", bits=3, group_size=32, recipe="uniform", dtype="float32")
    three = load_model(out)
    packed = mx.quantize(mx.array(meant[name]), 32, 3)
    assert mx.array_equal(three.layers[0].mlp.experts.up_proj.weight, packed[0])


def test_mlx_lm_loads_it(tmp_path: Path) -> None:
    write_gptq(tmp_path / "a")
    assert_mlx_lm_agrees(tmp_path)


UP = "model.language_model.layers.1.mlp.experts.2.up_proj"


def drop(name: str) -> Callable[[Written], Any]:
    return lambda written: written.pop(name)


REFUSED: dict[str, tuple[Callable[[Written], Any] | None, dict[str, Any], str]] = {
    "no scales": (drop(f"{UP}.scales"), {}, r"experts.2.up_proj.scales is in none of the files .*F16/.* \[5, 96\]"),
    "no integers": (drop(f"{UP}.qweight"), {}, r"experts.2.up_proj.qweight is in none of the files .*I32 \[20, 96\]"),
    "no order of one": (drop(f"{UP}.g_idx"), {}, r"experts.2.up_proj.g_idx is in none of the files .*I32 \[160\]"),
    "groups of another size": (None, {"group_size": 64}, "which groups of 64 .* do not divide"),
    "a shape": (
        put(f"{UP}.qzeros", "I32", np.zeros((5, 11), np.int32)), {},
        r"up_proj.qzeros in model.safetensors has shape \[5, 11\], expected \[5, 12\] by config.json",
    ),
    "scales of another kind": (
        put(f"{UP}.scales", "BF16", np.zeros((5, 96), np.uint16)), {}, "scales .*dtype BF16, expected F16 as its neigh"
    ),
    "scattered columns": (
        spoil(f"{UP}.g_idx", (3,), 4), {}, f"{UP}.g_idx in .* puts column 3 into group 4, not 0.*desc_act"
    ),
    "another zero": (
        spoil(f"{UP}.qzeros", (2, 3), 0x77777767), {},
        f"{UP}.qzeros in model.safetensors holds 0x77777767 where a symmetric quantization of 4 bits stores 0x77777777",
    ),
    "a tower of integers": (
        put("model.visual.blocks.0.attn.qkv.qweight", "I32", np.zeros((3, 72), np.int32)), {},
        "attn.qkv.qweight in .* is left over: GPTQ is read in linear maps of the text model only",
    ),
    "order of columns by config": (None, {"desc_act": "yes"}, "config.desc_act is 'yes'.*take the unquant"),
    "no word of zeros": (None, {"sym": None}, "quantization_config.sym is None where true or false"),
    "five bits": (None, {"bits": 5}, "quantization_config.bits is 5, and GPTQ is read with 2, 3, 4, 8 bits only"),
    "other groups": (None, {"group_size": 16}, "group_size is 16, and MLX has groups of 32, 64, 128 only"),
    "another format": (None, {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
    "bits by module": (None, {"dynamic": {"+:.*down_proj": {"bits": 8}}}, "dynamic gives '.:.*down_proj' settings"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    change, section, message = REFUSED[case]
    write_gptq(tmp_path / "a", change=change)
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    config["quantization_config"] |= section
    path.write_text(json.dumps(config))
    for attempt in (lambda: load_model(tmp_path / "a"), lambda: convert(tmp_path / "a", tmp_path / "b")):
        with pytest.raises(CheckpointError, match=message) as caught:
            attempt()
        assert str(tmp_path) in str(caught.value) or "model.safetensors" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_words_are_only_transposed(tmp_path: Path) -> None:
    write_gptq(tmp_path / "a")
    words = read(open_folder(tmp_path / "a").entries[f"{UP}.qweight"]).view(np.uint32)
    assert np.array_equal(np.array(load_model(tmp_path / "a").layers[1].mlp.experts.up_proj.weight[2]), words.T)


def test_gptq_words_in_config_over_mlx_files(tmp_path: Path) -> None:
    write_gptq(tmp_path / "a")
    out = convert(tmp_path / "a", tmp_path / "b", group_size=32)
    path = out / "config.json"
    config = json.loads(path.read_text())
    del config["quantization"]
    config["quantization_config"] = json.loads((tmp_path / "a/config.json").read_text())["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="says quant_method 'gptq', but the files have MLX's layout"):
        load_model(out)
