"""Every published form: loaded, converted and streamed, it computes what its formula says that its numbers mean."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.quantize import unpack
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from tests.checkpoint.published import FFN, FORMS, SIZES, Published, write
from tests.checkpoint.test_fp8 import fused
from tests.checkpoint.test_fp8 import published as ours
from tests.checkpoints import Tensors, random_tensors, tiny_config, write_checkpoint

TOKENS = mx.array([[3, 8, 1, 60, 22, 7, 19]])
kinds = pytest.mark.parametrize("kind", ["dense", "moe"])
forms = pytest.mark.parametrize("form", FORMS)
own = pytest.mark.parametrize("form", [n for n in FORMS if "told beside" not in n and "auto-round" not in n])


def values(source: Source, module: str) -> np.ndarray:
    """What the parts of a module stand for, in float32."""
    names = [f"{module}.{kind}" for kind in ("weight", "scales", "biases", "factors")]
    made = {n.rpartition(".")[2]: p.finish(p.fetch(), None) for n in names if (p := source.parts.get(n))}
    spec = source.specs.get(module)
    return np.array(unpack(made, spec) if spec else made["weight"].astype(mx.float32))


def linear(meant: Tensors) -> Tensors:
    """Of the text model, under our names."""
    found = ours(meant).items()
    return {name: v for name, v in found if name.endswith("_proj.weight") and not name.startswith(("mtp.", "vision."))}


def plain(folder: Path, meant: Tensors) -> Path:
    """The same model, unquantized."""
    config = json.loads((folder / "config.json").read_text())
    config.pop("quantization_config", None)
    return write_checkpoint(folder.parent / "plain", config, fused(meant))


def away(one: Path, other: Path) -> float:
    found = [load_model(folder, dtype="float32")(TOKENS) for folder in (one, other)]
    assert mx.abs(found[1]).max().item() > 0.1
    return mx.abs(found[0] - found[1]).max().item()


@kinds
@forms
def test_load(tmp_path: Path, form: str, kind: str) -> None:
    """The values are the formula's own, and so are the logits."""
    told: Published = FORMS[form]
    meant = write(tmp_path / "a", told, kind)
    source = open_source(tmp_path / "a")
    for name, value in linear(meant).items():
        found = values(source, name.removesuffix(".weight"))
        assert np.abs(found - value).max() <= told.unlike * np.abs(value).max(), name
    modes = {spec.mode for spec in source.specs.values()}
    assert told.mode in modes if told.mode else not modes
    assert away(tmp_path / "a", plain(tmp_path / "a", meant)) <= 2e-3


@own
def test_convert(tmp_path: Path, form: str) -> None:
    """To 4 bits: the same integers where they are 4 bits already, else those of the exact values."""
    told = FORMS[form]
    meant = linear(write(tmp_path / "a", told))
    before = open_source(tmp_path / "a")
    how = {"bits": 4, "group_size": 32, "recipe": "uniform", "dtype": "float32"}
    after = open_source(convert(tmp_path / "a", tmp_path / "b", **how))
    for name, value in meant.items():
        module = name.removesuffix(".weight")
        kept = (spec := before.carried(module)) is not None and (spec.mode, spec.bits) == ("affine", 4)
        due = value if kept else np.array(mx.dequantize(*mx.quantize(mx.array(value), 32, 4), 32, 4))
        differing = np.mean(np.abs(values(after, module) - due) > 10 * told.unlike * np.abs(due).max())
        assert differing <= (0.1 if told.unlike else 0), name  # a tie may fall the other way


@own
def test_stream(tmp_path: Path, form: str) -> None:
    """Bit for bit what the resident model computes; or refused, in words, before a weight is read."""
    told = FORMS[form]
    write(tmp_path / "a", told)
    plan = StreamPlan((3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    if not told.streams:
        with pytest.raises(CheckpointError, match="cannot be streamed as they are"):
            load_model(tmp_path / "a", stream=plan)
        return
    resident, streamed = load_model(tmp_path / "a"), load_model(tmp_path / "a", stream=plan)
    for tokens in (TOKENS, TOKENS[:, :1]):
        assert mx.array_equal(streamed(tokens), resident(tokens))


def test_one_scale_a_tensor_of_mlx_lm(tmp_path: Path) -> None:
    """nvfp4 with `global_scale`, [E] for the experts: as MLX has it, times scale / (6 * 448); resident and streamed."""
    config = tiny_config("moe", **SIZES | FFN["moe"])
    write_checkpoint(tmp_path / "a", config, random_tensors(config, 3))
    folder = convert(tmp_path / "a", tmp_path / "b", mode="nvfp4", recipe="uniform", dtype="float32")
    before, tensors = open_source(folder), mx.load(str(folder / "model.safetensors"))
    modules = [name for name in before.specs if ".mlp.experts." in name and before.specs[name].mode == "nvfp4"]
    assert len(modules) == 6
    for number, module in enumerate(modules):
        path = f"language_model.model.{module.replace('experts', 'switch_mlp')}"
        tensors[f"{path}.global_scale"] = mx.arange(1.0, 5.0) * (1000 + 100 * number)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/config.json").write_bytes((folder / "config.json").read_bytes())
    mx.save_safetensors(str(tmp_path / "c/model.safetensors"), tensors, {"format": "mlx"})
    after = open_source(tmp_path / "c")
    for number, module in enumerate(modules):
        factors = np.arange(1, 5, dtype=np.float32) * (1000 + 100 * number) * np.float32(1 / 2688)
        assert np.allclose(values(after, module), values(before, module) * factors[:, None, None], rtol=1e-6, atol=0)
    plan = StreamPlan((3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    found = load_model(tmp_path / "c")(TOKENS)
    assert mx.array_equal(load_model(tmp_path / "c", stream=plan)(TOKENS), found)
    assert mx.abs(found - load_model(folder)(TOKENS)).max().item() > 0.1


@forms
def test_rows_are_read_apart(tmp_path: Path, form: str) -> None:
    """A stretch of rows is that stretch of all of them, also where the files have a map's rows as columns."""
    write(tmp_path / "a", FORMS[form], "dense")
    source = open_source(tmp_path / "a")
    for name, part in source.parts.items():
        if part.entries and name.endswith(("_proj.weight", "_proj.scales", "_proj.biases")):
            whole, rows = part.finish(part.fetch(), None), part.rows
            start, stop = (rows // 3, rows - 1) if part.cuts else (0, rows)
            made = part.finish(part.fetch(start, stop), None)
            assert made.dtype == whole.dtype and mx.array_equal(made, whole[start:stop]), name
    scattered = form == "gptq, scattered"
    assert not scattered or all(part.cuts for part in source.parts.values())
