"""What convert() writes: every value where it belongs, the folder as every loader wants it, nothing half-written."""

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint.files import INDEX, open_file, open_folder, read
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion import pipeline, samples, task, write
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.test_quantized import FFN, SIZES, dequantized, write_quantized
from tests.checkpoints import loaded, random_tensors, relayout, tiny_config, write_checkpoint, write_safetensors

TARGETS = [
    {"bits": None}, {"bits": 2, "group_size": 32}, {"bits": 3}, {"bits": 4}, {"bits": 5}, {"bits": 6},
    {"bits": 8, "group_size": 32}, {"mode": "mxfp4"}, {"mode": "mxfp8"}, {"mode": "nvfp4"},
]  # fmt: skip
STEERING = ("mlp.gate", "mlp.shared_expert_gate", "linear_attn.in_proj_a", "linear_attn.in_proj_b")


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return tiny_config(kind, vision=True, mtp_num_hidden_layers=1, **SIZES, **FFN[kind]) | changes


def source_of(folder: Path, kind: str = "moe", *, config: dict[str, Any] | None = None, **how: Any) -> Path:
    config = config or config_of(kind)
    write_checkpoint(folder, config, random_tensors(config, 6), **how)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "generation_config.json").write_text('{"top_k": 20}')
    (folder / "LICENSE").write_text("Apache")
    (folder / "README.md").write_text("a model card of the source")
    return folder


def contents(folder: Path) -> dict[str, np.ndarray]:
    return {name: read(entry) for name, entry in open_folder(folder).entries.items()}


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_values(tmp_path: Path, kind: str, target: dict[str, Any]) -> None:
    """Every linear map is mx.quantize of the source's, everything else the source's own."""
    recipe = None if target == {"bits": None} else "uniform"
    out = convert(source_of(tmp_path / "a", kind), tmp_path / "b", **target, recipe=recipe)
    model = load_model(out)
    published = dict(loaded(n, v) for n, v in relayout(random_tensors(config_of(kind), 6), "mlx").items())
    quantized = 0
    for name, value in dequantized(model).items():
        value_meant = mx.array(published[name])
        parent = model
        for part in name.split(".")[:-1]:
            parent = parent[int(part)] if isinstance(parent, list) else getattr(parent, part)
        if "scales" in parent:
            how = {"group_size": parent.group_size, "bits": parent.bits, "mode": parent.mode}
            value_meant = mx.dequantize(*mx.quantize(value_meant, **how), **how)
            quantized += 1
            if name.removesuffix(".weight").endswith(STEERING):
                assert parent.bits == 8, name
        assert mx.array_equal(value.astype(mx.float32), value_meant.astype(mx.float32)), name
    assert bool(quantized) == (target.get("bits", 4) is not None)


def test_folder(tmp_path: Path) -> None:
    """As docs/CHECKPOINTS.md lays it down."""
    source = source_of(tmp_path / "a")
    out = convert(source, tmp_path / "b", recipe="uniform")
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", INDEX, "mtp",
         "tokenizer.json"]
    )  # fmt: skip
    found = open_folder(out)
    assert set(found.formats.values()) == {"mlx"}
    assert all(name.startswith(("language_model.model.", "language_model.lm_head.", "vision_tower."))
               for name in found.entries)  # fmt: skip
    assert found.entries["language_model.model.layers.0.mlp.switch_mlp.gate_proj.scales"].shape == (8, 64, 2)
    config, before = (json.loads((folder / "config.json").read_text()) for folder in (out, source))
    quantization = config.pop("quantization")
    assert quantization == config.pop("quantization_config")
    assert config == before
    assert {key: quantization.pop(key) for key in ("bits", "group_size", "mode")} == {
        "bits": 4, "group_size": 64, "mode": "affine"
    }  # fmt: skip
    layers = "language_model.model.layers"
    gates = [f"{layers}.{n}.mlp.{name}" for n in range(4) for name in ("gate", "shared_expert_gate")]
    gates += [f"{layers}.{n}.linear_attn.in_proj_{name}" for n in range(3) for name in "ab"]
    assert quantization == dict.fromkeys(gates, {"bits": 8, "group_size": 64, "mode": "affine"})


def test_rows_that_no_group_divides_stay_unquantized(tmp_path: Path) -> None:
    config = tiny_config("dense", linear_value_head_dim=12)  # out_proj has rows of 72
    write_checkpoint(tmp_path / "a", config, random_tensors(config))
    out = convert(tmp_path / "a", tmp_path / "b")
    quantization = json.loads((out / "config.json").read_text())["quantization"]
    path = "language_model.model.layers.0.linear_attn.out_proj"
    assert quantization[path] is False
    assert f"{path}.scales" not in open_folder(out).entries
    load_model(out)


def test_vision_tower(tmp_path: Path) -> None:
    out = contents(convert(source_of(tmp_path / "a"), tmp_path / "b"))
    meant = {n: v for n, v in relayout(random_tensors(config_of("moe"), 6), "mlx").items() if n.startswith("vision")}
    assert {name for name in out if name.startswith("vision")} == meant.keys()
    assert all(np.array_equal(out[name], value) for name, value in meant.items())
    assert out["vision_tower.patch_embed.proj.weight"].shape == (24, 2, 4, 4, 3)  # [V, T, P, P, C]


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_mtp(tmp_path: Path, layout: str) -> None:
    tensors = random_tensors(config_of("moe"), 6)
    source = source_of(tmp_path / "a", layout=layout)
    for folder in (convert(source, tmp_path / "b"), None):
        folder = folder or convert(tmp_path / "b", tmp_path / "c", bits=2)  # and once more, from MLX
        found = open_file(folder / "mtp/weights.safetensors")
        assert found.formats == {"weights.safetensors": "mlx"}
        values = {name: read(entry) for name, entry in found.entries.items()}
        assert len(values) == 4 + 6 + 2 + 3 + 3 + 2  # its own, attention, norms, experts, shared expert, gates
        assert np.array_equal(values["mtp.fc.weight"], tensors["mtp.fc.weight"])
        assert np.array_equal(values["mtp.norm.weight"], tensors["mtp.norm.weight"] + 1)
        fused = tensors["mtp.layers.0.mlp.experts.gate_up_proj"]
        assert np.array_equal(values["mtp.layers.0.mlp.switch_mlp.gate_proj.weight"], fused[:, :64])
        assert np.array_equal(values["mtp.layers.0.mlp.switch_mlp.up_proj.weight"], fused[:, 64:])
        assert not [name for name in open_folder(folder).entries if "mtp" in name]


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert", "mlx", "mlx-text"])
def test_every_source_gives_the_same_files(tmp_path: Path, layout: str) -> None:
    config = config_of("moe")
    tensors = {n: v for n, v in random_tensors(config, 6).items() if not n.startswith("mtp") and "visual" not in n}
    first = convert(write_checkpoint(tmp_path / "a", config, tensors), tmp_path / "b")
    again = convert(write_checkpoint(tmp_path / "c", config, tensors, layout=layout, shards=2), tmp_path / "d")
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_quantized_source_is_carried_or_requantized(tmp_path: Path) -> None:
    """The same format goes over bit by bit, another is packed from the exact values of the first."""
    write_quantized(tmp_path / "a", "moe", {"group_size": 64, "bits": 4, "mode": "affine"})
    before = contents(tmp_path / "a")
    carried = contents(convert(tmp_path / "a", tmp_path / "b", recipe="uniform"))
    same = [name for name in before if not name.rpartition(".")[0].endswith(STEERING)]
    assert len(same) > 50 and all(np.array_equal(before[name], carried[name]) for name in same)
    plain = load_model(convert(tmp_path / "a", tmp_path / "c", bits=None))
    meant = dequantized(load_model(tmp_path / "a"))
    assert all(mx.array_equal(value, meant[name]) for name, value in dequantized(plain).items())
    other = load_model(convert(tmp_path / "a", tmp_path / "d", mode="mxfp8")).layers[0].mlp.experts.up_proj
    packed = mx.quantize(meant["layers.0.mlp.experts.up_proj.weight"], 32, 8, mode="mxfp8")
    assert mx.array_equal(other.weight, packed[0]) and mx.array_equal(other.scales, packed[1])


def test_dtype(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a", dtype="bfloat16")
    kept = open_folder(convert(source, tmp_path / "b")).entries
    cast = open_folder(convert(source, tmp_path / "c", dtype="float16")).entries
    layer = "language_model.model.layers.0."
    for name in (f"{layer}input_layernorm.weight", f"{layer}linear_attn.in_proj_z.scales"):
        assert (kept[name].dtype, cast[name].dtype) == ("BF16", "F16")
    assert kept[f"{layer}linear_attn.A_log"].dtype == cast[f"{layer}linear_attn.A_log"].dtype == "F32"
    config = json.loads((tmp_path / "c/config.json").read_text())
    assert config["text_config"]["dtype"] == "float16"
    load_model(tmp_path / "c")


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = source_of(tmp_path / "a")
    whole = convert(source, tmp_path / "b")
    monkeypatch.setattr(write.plan_shards, "__defaults__", (200_000,))
    monkeypatch.setattr(task, "PIECE_BYTES", 20_000)  # and in small pieces
    parts = convert(source, tmp_path / "c")
    shards = sorted(path.name for path in parts.glob("model*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert max((parts / shard).stat().st_size for shard in shards) < 300_000
    one, many = contents(whole), contents(parts)
    assert one.keys() == many.keys() and all(np.array_equal(one[name], many[name]) for name in one)
    index = json.loads((parts / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in many.values())


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 1 << 16)
    monkeypatch.setattr(samples, "_SAMPLE", 1 << 12)
    monkeypatch.setattr(pipeline, "workers", lambda: 1)
    peaks = []
    for experts in (8, 32):
        sizes = {"num_experts": experts, "moe_intermediate_size": 64, "hidden_size": 128}
        config = tiny_config("moe", layer_types=["linear_attention"], **sizes)
        source = write_checkpoint(tmp_path / f"a{experts}", config, random_tensors(config))
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(source, tmp_path / f"b{experts}", recipe="uniform")
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] <= peaks[0] * 1.1 and peaks[1] < 4 << 16


def test_progress(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    source = source_of(tmp_path / "a")
    convert(source, tmp_path / "b", on_progress=lambda done, total: seen.append((done, total)))
    total = sum(entry.nbytes for entry in open_folder(source).entries.values())
    assert seen[0] == (0, total) and seen[-1] == (total, total)


def test_nothing_is_left_of_a_failure(tmp_path: Path) -> None:
    """NaN is named; neither the target nor a part of it is there afterwards."""
    config = config_of("moe")
    for bad in (np.nan, np.inf):
        tensors = random_tensors(config, 6)
        tensors["model.language_model.layers.3.mlp.experts.down_proj"][7, 3, 2] = bad
        source = write_checkpoint(tmp_path / "a", config, tensors)
        with pytest.raises(CheckpointError, match="layers.3.mlp.experts.down_proj in .* holds NaN or inf"):
            convert(source, tmp_path / "out/b")
        assert list((tmp_path / "out").iterdir()) == []


def test_interrupted(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a")
    target = convert(source, tmp_path / "out/b", bits=8)
    before = (target / "model.safetensors").read_bytes()

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, overwrite=True, on_progress=stop)
    assert (target / "model.safetensors").read_bytes() == before
    convert(source, target, overwrite=True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b"]


def test_target(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a")
    convert(source, tmp_path / "b")
    with pytest.raises(CheckpointError, match="exists already.*--overwrite, overwrite=True"):
        convert(source, tmp_path / "b", bits=8)
    convert(source, tmp_path / "b", bits=8, overwrite=True)
    assert load_model(tmp_path / "b").embed_tokens.bits == 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    for same in (source, tmp_path):
        with pytest.raises(CheckpointError, match="is the source or holds it"):
            convert(source, same, overwrite=True)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="is no checkpoint and is not overwritten"):
        convert(source, tmp_path / "c", overwrite=True)


@pytest.mark.parametrize(
    "what", [{"bits": 7}, {"group_size": 48}, {"mode": "mxfp4", "bits": 8}, {"mode": "nvfp4", "group_size": 32},
             {"mode": "int4"}], ids=str
)  # fmt: skip
def test_quantizations_that_do_not_exist(tmp_path: Path, what: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="MLX"):
        convert(tmp_path, tmp_path / "b", **what)


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(CheckpointError, match="0 bytes free and the conversion needs .* [KM]B: "):
        convert(source_of(tmp_path / "a"), tmp_path / "b")


def test_vision_config_iff_vision_tensors(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 6)
    text = {name: value for name, value in tensors.items() if "visual" not in name}
    out = convert(write_checkpoint(tmp_path / "a", config, text), tmp_path / "b")
    assert "vision_config" not in json.loads((out / "config.json").read_text())
    del config["vision_config"]
    source = write_checkpoint(tmp_path / "c", config, tensors)
    with pytest.raises(CheckpointError, match="vision tensors, but config.json has no vision_config"):
        convert(source, tmp_path / "d")


def test_redundant_head_is_dropped_and_the_tie_is_said_where_mlx_lm_reads_it(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 6)
    tensors["lm_head.weight"] = tensors["model.language_model.embed_tokens.weight"]
    del config["text_config"]["tie_word_embeddings"]
    out = convert(write_checkpoint(tmp_path / "a", config, tensors), tmp_path / "b")
    assert not [name for name in open_folder(out).entries if "lm_head" in name]
    assert json.loads((out / "config.json").read_text())["text_config"]["tie_word_embeddings"] is True


def test_mtp_twice_or_strange(tmp_path: Path) -> None:
    source = source_of(tmp_path / "a")
    (source / "mtp").mkdir()
    value = {"mtp.norm.weight": np.ones(128, np.float32)}
    write_safetensors(source / "mtp/weights.safetensors", value, {"mtp.norm.weight": "float32"}, {"format": "mlx"})
    with pytest.raises(CheckpointError, match="MTP tensors in its shards and in mtp"):
        convert(source, tmp_path / "b")
    config = config_of("moe")
    tensors = {name: value for name, value in random_tensors(config, 6).items() if not name.startswith("mtp")}
    write_checkpoint(source, config, tensors)
    write_safetensors(source / "mtp/weights.safetensors", {"norm": np.ones(3)}, {"norm": "float32"}, {"format": "mlx"})
    with pytest.raises(CheckpointError, match="holds norm, which is no MTP tensor"):
        convert(source, tmp_path / "b")


def test_mlx_lm_loads_it(tmp_path: Path) -> None:
    peer = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
    out = convert(source_of(tmp_path / "a"), tmp_path / "b", bits=3, group_size=32)
    theirs, _ = peer.load_model(out)
    assert mx.abs(theirs(tokens) - load_model(out)(tokens)).max().item() < 2e-3
    found = {name for name, _ in tree_flatten(theirs.parameters())}
    assert found == {name for name in open_folder(out).entries if not name.startswith("vision")}
