"""MLX checkpoints as a source: quantized towers and MTP layers, and what there is nothing to convert of."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import open_file, open_folder, read
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion import task
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.test_quantized import dequantized, write_quantized
from tests.checkpoints import random_tensors, write_checkpoint
from tests.conversion.test_convert import config_of, contents, source_of

TOWER = {"hidden_size": 64, "intermediate_size": 192, "out_hidden_size": 128}  # rows that groups divide
AFFINE = {"group_size": 64, "bits": 4, "mode": "affine"}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 50_000)


@pytest.mark.parametrize("spec", [AFFINE, {"group_size": 32, "bits": 8, "mode": "mxfp8"}], ids=str)
def test_quantized_tower_is_carried_or_dequantized(tmp_path: Path, spec: dict[str, Any]) -> None:
    """Bit by bit under its path in config.json; a conversion that quantizes nothing leaves nothing quantized."""
    meant = write_quantized(tmp_path / "a", "dense", spec, vision=TOWER)
    before = contents(tmp_path / "a")
    towers = [name for name in before if name.startswith("vision_tower.")]
    assert sum(name.endswith(".scales") for name in towers) > 8
    out = convert(tmp_path / "a", tmp_path / "b", bits=3)
    after = contents(out)
    assert all(np.array_equal(before[name], after[name]) for name in towers)
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    assert quantization["vision_tower.blocks.0.attn.qkv"] == spec
    for name, value in dequantized(load_model(out)).items():
        if name.startswith("vision."):
            assert mx.array_equal(value.reshape(-1), meant[name].astype(value.dtype).reshape(-1)), name
    plain = convert(tmp_path / "a", tmp_path / "c", bits=None, dtype="float32")
    assert not [name for name in open_folder(plain).entries if name.endswith(".scales")]
    assert "quantization" not in json.loads((plain / "config.json").read_text())
    for name, value in dequantized(load_model(plain)).items():
        assert mx.array_equal(value.reshape(-1), meant[name].astype(mx.float32).reshape(-1)), name


def write_mtp(folder: Path, spec: dict[str, Any], beside: bool) -> dict[str, mx.array]:
    """An MLX checkpoint whose MTP layer is quantized, in its shard or in mtp/; returns what its tensors mean."""
    config = config_of("moe") | {"quantization": spec}
    plain = convert(source_of(folder.parent / "plain"), folder.parent / "unquantized", bits=None)
    beside_it = open_file(plain / "mtp/weights.safetensors").entries
    published = contents(plain) | {name: read(entry) for name, entry in beside_it.items()}
    main, mtp, meant = {}, {}, {}
    for name, value in published.items():
        array = mx.array(value)
        path = name.removesuffix(".weight")
        if path == name or array.ndim < 2 or "conv1d" in name or name.startswith("vision"):
            (mtp if name.startswith("mtp.") else main)[name] = meant[name] = array
            continue
        parts = mx.quantize(array, **spec)
        found = dict(zip((f"{path}.weight", f"{path}.scales", f"{path}.biases"), parts, strict=False))
        meant[name] = mx.dequantize(*parts, **spec)
        (mtp if name.startswith("mtp.") else main).update(found)
    folder.mkdir()
    if beside:
        (folder / "mtp").mkdir()
        mx.save_safetensors(str(folder / "mtp/weights.safetensors"), mtp, metadata={"format": "mlx"})
        mtp = {}
    mx.save_safetensors(str(folder / "model.safetensors"), main | mtp, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(config))
    return meant


@pytest.mark.parametrize("beside", [False, True], ids=["in shards", "in mtp"])
@pytest.mark.parametrize("spec", [AFFINE, {"group_size": 16, "bits": 4, "mode": "nvfp4"}], ids=str)
def test_quantized_mtp_is_dequantized(tmp_path: Path, spec: dict[str, Any], beside: bool) -> None:
    meant = write_mtp(tmp_path / "a", spec, beside)
    out = convert(tmp_path / "a", tmp_path / "b", bits=8, dtype="float32", verify=True)
    found = {name: read(entry) for name, entry in open_file(out / "mtp/weights.safetensors").entries.items()}
    assert found.keys() == {name for name in meant if name.startswith("mtp.")} and len(found) == 20
    assert all(np.array_equal(value, np.array(meant[name].astype(mx.float32))) for name, value in found.items())


def test_mtp_that_config_says_otherwise(tmp_path: Path) -> None:
    write_mtp(tmp_path / "a", AFFINE, beside=True)
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    config["quantization"]["mtp.fc"] = AFFINE | {"bits": 8}
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="mtp.* is quantized, and config.json's quantization does not say so"):
        convert(tmp_path / "a", tmp_path / "b", bits=8)
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("how", [{}, {"bits": None}, {"mode": "mxfp8"}, {"dtype": "bfloat16"}], ids=str)
def test_already_what_was_asked_for(tmp_path: Path, how: dict[str, Any]) -> None:
    out = convert(source_of(tmp_path / "a"), tmp_path / "b", **how)
    with pytest.raises(CheckpointError, match="b is already an MLX checkpoint with what was asked for"):
        convert(out, tmp_path / "c", **how)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    changed = {"dtype": "float16"} if how.get("bits", 4) is None else {"bits": 3}
    load_model(convert(out, tmp_path / "c", **changed))


def test_rewritten_where_names_or_places_differ(tmp_path: Path) -> None:
    """An MLX checkpoint without full names is not what is asked for, though no value changes."""
    config = config_of("moe")
    tensors = {n: v for n, v in random_tensors(config, 6).items() if not n.startswith("mtp") and "visual" not in n}
    write_checkpoint(tmp_path / "a", config, tensors, layout="mlx-text")
    out = convert(tmp_path / "a", tmp_path / "b", bits=None)
    assert all(name.startswith("language_model.") for name in open_folder(out).entries)


def test_a_recipe_for_nothing(tmp_path: Path) -> None:
    for how in ({"recipe": "uniform"}, {"target_size": 10**9}):
        with pytest.raises(CheckpointError, match="bits=None not to: give one of them"):
            convert(tmp_path / "a", tmp_path / "b", bits=None, **how)


def test_values_that_float16_does_not_hold(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 6)
    tensors["model.language_model.layers.1.mlp.up_proj.weight"][2, 3] = 1e6
    source = write_checkpoint(tmp_path / "a", config, tensors)
    with pytest.raises(CheckpointError, match="layers.1.mlp.up_proj.weight .* float16 does not hold"):
        convert(source, tmp_path / "b", bits=None, dtype="float16")
    convert(source, tmp_path / "b", bits=None, dtype="bfloat16")


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_the_place_of_a_nan(tmp_path: Path, layout: str) -> None:
    config = config_of("moe")
    tensors = random_tensors(config, 6)
    tensors["model.language_model.layers.2.mlp.experts.gate_up_proj"][5, 64 + 7, 9] = np.nan
    source = write_checkpoint(tmp_path / "a", config, tensors, layout=layout)
    named = {"hf": r"experts.gate_up_proj in .* at \[5, 71, 9\]", "hf-per-expert": r"experts.5.up_proj.* at \[7, 9\]"}
    with pytest.raises(CheckpointError, match=named[layout]):
        convert(source, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def quantized(out: Path) -> dict[str, Any]:
    return json.loads((out / "config.json").read_text())["quantization"]


def test_bits_are_not_raised(tmp_path: Path) -> None:
    """A recipe that gives a module as many bits as it has, or more, leaves it bit by bit as it is."""
    source = convert(source_of(tmp_path / "a"), tmp_path / "b", bits=4, recipe="mixed_3_6")
    before = contents(source)
    with pytest.raises(CheckpointError, match="b is already .* with fewer bits, to which more would restore nothing"):
        convert(source, tmp_path / "c", bits=6, group_size=32)
    out = convert(source, tmp_path / "c", bits=6, group_size=32, dtype="float16")
    after, said = contents(out), quantized(out)
    spec = {key: said.pop(key) for key in ("bits", "group_size", "mode")}
    assert spec == {"bits": 3, "group_size": 64, "mode": "affine"}  # most have these, and none what was asked
    assert after.keys() == before.keys()
    words = [name for name, value in before.items() if value.dtype == np.uint32]
    assert words and all(np.array_equal(after[name], before[name]) for name in words)
    assert said == {path: how for path, how in quantized(source).items() if isinstance(how, dict)}
    fewer, was = quantized(convert(source, tmp_path / "d", bits=2)), quantized(source)
    assert fewer["bits"] == 2  # some have fewer than before, and none more
    for path, how in fewer.items():
        assert not isinstance(how, dict) or how["bits"] <= was.get(path, was)["bits"], path


def test_uniform_bits_are_as_they_are_asked(tmp_path: Path) -> None:
    source = convert(source_of(tmp_path / "a"), tmp_path / "b", bits=3, recipe="uniform")
    out = convert(source, tmp_path / "c", bits=8, group_size=32, recipe="uniform")
    said = quantized(out)
    assert (said["bits"], said["group_size"]) == (8, 32)
    assert not [how for how in said.values() if isinstance(how, dict) and how["bits"] < 8]
