"""What quantizing loses: measured as it is; modules that a form would spoil get another one, or the work is refused."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.quantize import pack, unpack
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion import task
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.loss import EVERY, MOST_EMPTIED, Loss, loss
from mlx_qwen35.conversion.samples import sample_rows
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

NVFP4 = QuantSpec(4, 16, "nvfp4")
SPECS = [NVFP4, QuantSpec(4, 32, "mxfp4"), QuantSpec(4, 64, "affine"), QuantSpec(2, 32, "affine")]
SIZES = {"hidden_size": 128, "vocab_size": 256}
FFN = {"dense": {"intermediate_size": 192}, "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}}
TOKENS = mx.array([[3, 99, 7, 250, 31, 8]])


def normal(seed: int, *shape: int, size: float) -> np.ndarray:
    return (np.random.RandomState(seed).standard_normal(shape) * size).astype(np.float32)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("size", [1.0, 2e-3])
def test_loss_is_what_reading_back_shows(spec: QuantSpec, size: float) -> None:
    """Groups by looking at every one, and the error of the rows that are read back (one of EVERY)."""
    weight = normal(1, 3, 80, 256, size=size)
    weight[1, 5] = 0  # what was zero is not lost
    found = pack(mx.array(weight), spec)
    back = np.array(unpack(found, spec).astype(mx.float32))
    measured = loss(mx.array(weight), found, spec)
    groups = (a.reshape(-1, spec.group_size) for a in (back, weight))
    emptied = sum(not b.any() and w.any() for b, w in zip(*groups, strict=True))
    assert measured.emptied == emptied and measured.groups == weight.size // spec.group_size
    rows, again = (a.reshape(-1, 256)[::EVERY] for a in (weight, back))
    assert measured.relative == pytest.approx(np.linalg.norm(rows - again) / np.linalg.norm(rows), rel=1e-5)
    assert (emptied > 0) == (spec == NVFP4 and size < 0.01)


def test_what_is_too_much() -> None:
    assert Loss(0.0, 0.0, 10, 0).excess(NVFP4) is None  # all zeros, and nothing lost
    assert "50.0% of its groups" in Loss(0.0, 1.0, 10, 5).excess(NVFP4)
    assert Loss(0.0, 1.0, 1000, 5).excess(NVFP4) is None and 0.005 == MOST_EMPTIED
    assert "loses 30% of its size" in Loss(0.09, 1.0, 10, 0).excess(NVFP4)
    assert Loss(0.09, 1.0, 10, 0).excess(QuantSpec(3, 64, "affine")) is None
    assert Loss(0.09, 1.0, 10, 0).excess(NVFP4, 2.0) is None
    assert Loss(1.0, 0.0, 10, 0).excess(NVFP4, 2.0)  # something of nothing
    assert Loss(float("nan"), 1.0, 10, 0).excess(NVFP4, 2.0)
    assert Loss(1.0, 2.0, 3, 4) + Loss(10.0, 20.0, 30, 40) == Loss(11.0, 22.0, 33, 44)


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8"])
@pytest.mark.parametrize("size", [2.0**-99, 2.0**-120, 2.0**-126, 2.0**-140])
def test_weights_below_any_scale_do_not_become_huge(mode: str, size: float) -> None:
    """As of rows that training left behind; MLX 0.32.4 makes 2^122 of their scales."""
    spec = QuantSpec(4 if mode == "mxfp4" else 8, 32, mode)
    weight = np.concatenate([normal(1, 2, 64, size=size), normal(2, 2, 64, size=1.0)])
    back = np.array(unpack(pack(mx.array(weight), spec), spec))
    assert np.abs(back - weight).max(axis=1)[:2].max() <= np.abs(weight[:2]).max()
    assert np.array_equal(back[2:], np.array(unpack(pack(mx.array(weight[2:]), spec), spec)))


@pytest.mark.parametrize("mode", ["nvfp4", "mxfp4"])
def test_rows_that_no_group_divides(tmp_path: Path, mode: str) -> None:
    """80 is five groups of nvfp4, and MLX takes pairs of them."""
    config = tiny_config("dense", **(SIZES | {"hidden_size": 80}), **FFN["dense"])
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    convert(source, tmp_path / "target", mode=mode)
    specs = open_source(tmp_path / "target").specs
    assert specs["layers.0.mlp.down_proj"].mode == mode and not specs.get("layers.0.mlp.gate_proj")
    assert np.isfinite(np.array(load_model(tmp_path / "target", dtype="float32")(TOKENS))).all()


def source_with_small(folder: Path, kind: str, small: str, size: float = 2e-3) -> Path:
    config = tiny_config(kind, **SIZES, **FFN[kind])
    tensors = random_tensors(config)
    for name, x in tensors.items():
        if small in name:
            tensors[name] = (x * (size / x.std())).astype(np.float32)
    return write_checkpoint(folder, config, tensors)


def rows_of(folder: Path, module: str) -> np.ndarray:
    origin = open_source(folder)
    shape = text_tensors(origin.config)[f"{module}.weight"]
    return np.array(sample_rows(origin, module, shape).astype(mx.float32))


@pytest.mark.parametrize(("kind", "small"), [("dense", "down_proj"), ("moe", "experts.down_proj"), ("dense", "o_proj")])
def test_small_weights_are_not_written_as_zeros(tmp_path: Path, kind: str, small: str) -> None:
    source = source_with_small(tmp_path / "source", kind, small)
    notes: list[str] = []
    target = convert(source, tmp_path / "target", mode="nvfp4", recipe="uniform", on_note=notes.append)
    said = json.loads((target / "config.json").read_text())["quantization"]
    specs = {path: spec for path, spec in said.items() if isinstance(spec, dict)}
    others = {path for path, spec in specs.items() if (spec["mode"], spec["bits"]) == ("affine", 4)}
    assert others and all(path.endswith(small.split(".")[-1]) for path in others) and said["mode"] == "nvfp4"
    assert len([line for line in notes if "groups of 16 weights become zero" in line]) == len(others)
    for module in {line.split()[0] for line in notes}:
        before, after = rows_of(source, module), rows_of(target, module)
        assert np.linalg.norm(before - after) < 0.2 * np.linalg.norm(before)
    assert mx.isfinite(load_model(target, dtype="float32")(TOKENS)).all()


def test_without_a_listener_it_is_a_warning(tmp_path: Path) -> None:
    source = source_with_small(tmp_path / "source", "dense", "down_proj")
    with pytest.warns(UserWarning, match=r"down_proj is affine of 4 bits in groups of 64 and not nvfp4"):
        convert(source, tmp_path / "target", mode="nvfp4")


def test_ordinary_weights_say_nothing(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = tiny_config("moe", **SIZES, **FFN["moe"])
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config))
    for number, asked in enumerate(({"mode": "nvfp4"}, {"mode": "mxfp4"}, {"bits": 3}, {"dtype": "float16"})):
        notes: list[str] = []
        convert(source, tmp_path / f"target{number}", on_note=notes.append, **asked)
        assert notes == []
    assert not recwarn.list


def test_scales_that_float16_does_not_hold(tmp_path: Path) -> None:
    """A sibling: affine scales in float16 end at 6e-8, and a group of smaller steps becomes zero. Its bits go up as far
    as they help; at last it stays as it is."""
    source = source_with_small(tmp_path / "source", "dense", "down_proj", size=2e-7)
    notes: list[str] = []
    target = convert(source, tmp_path / "target", dtype="float16", recipe="uniform", on_note=notes.append)
    said = json.loads((target / "config.json").read_text())["quantization"]
    assert {spec is False for path, spec in said.items() if path.endswith("down_proj")} == {True}
    assert notes and all("down_proj is not quantized" in line for line in notes)


def test_what_a_sample_does_not_show_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And nothing is left of it, nor can it be gone on with."""
    monkeypatch.setattr("mlx_qwen35.conversion.convert.suited", lambda origin, found, *_: (found, []))
    monkeypatch.setattr(task, "PIECE_BYTES", 1 << 12)
    source = source_with_small(tmp_path / "source", "dense", "down_proj")
    with pytest.raises(CheckpointError, match=r"down_proj.weight cannot be nvfp4 of 4 bits: .*become zero"):
        convert(source, tmp_path / "target", mode="nvfp4", recipe="uniform")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    notes: list[str] = []
    convert(source, tmp_path / "target", recipe="uniform", on_note=notes.append)
    assert notes == []


def test_a_few_lost_groups_are_said(tmp_path: Path) -> None:
    """Rows of tokens that nobody trained are small; too few to matter, and not passed over in silence."""
    config = tiny_config("dense", **{**SIZES, "vocab_size": 2048})
    tensors = random_tensors(config)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][300:308] = 1e-4 * np.sign(tensors[name][300:308])
    source = write_checkpoint(tmp_path / "source", config, tensors)
    notes: list[str] = []
    convert(source, tmp_path / "target", mode="nvfp4", recipe="uniform", on_note=notes.append)
    assert len(notes) == 1 and "at most 0.39% (embed_tokens.weight)" in notes[0]


def test_affine_scales_end_too(tmp_path: Path) -> None:
    """mx.quantize's at 1e-7: of what is below half of it nothing is left, which is said, and refused by nobody. The
    search for scales keeps it."""
    config = tiny_config("dense", **{**SIZES, "vocab_size": 2048})
    tensors = random_tensors(config)
    name = next(name for name in tensors if name.endswith("embed_tokens.weight"))
    tensors[name][300:340] *= 1e-8
    source = write_checkpoint(tmp_path / "source", config, tensors)
    notes: list[str] = []
    convert(source, tmp_path / "nearest", bits=8, recipe="uniform", on_note=notes.append)
    assert len(notes) == 1 and "at most 1.95% (embed_tokens.weight)" in notes[0]
    convert(source, tmp_path / "search", bits=8, on_note=notes.append)
    assert len(notes) == 1
    for target, kept in (("nearest", False), ("search", True)):
        origin = open_source(tmp_path / target)
        parts = {kind: origin.parts[f"embed_tokens.{kind}"] for kind in ("weight", "scales", "biases")}
        found = {kind: part.finish(part.fetch(300, 340), None) for kind, part in parts.items()}
        off = np.abs(np.array(unpack(found, origin.specs["embed_tokens"])) - tensors[name][300:340]).max()
        assert (off < 1e-2 * np.abs(tensors[name][300:340]).max()) == kept


def test_a_conversion_gone_on_with_remembers_what_was_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_qwen35.conversion.convert.suited", lambda origin, found, *_: (found, []))
    source = source_with_small(tmp_path / "source", "dense", "down_proj")
    seen = 0

    def stop(done: int, total: int) -> None:
        nonlocal seen
        seen += 1
        if done > 0.9 * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target", mode="nvfp4", recipe="uniform", on_progress=stop)
    with pytest.raises(CheckpointError, match="become zero"):
        convert(source, tmp_path / "target", mode="nvfp4", recipe="uniform", resume=True)
