"""What a conversion to GGUF refuses, what it leaves behind, and how it goes on."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.asked import check_request
from mlx_qwen35.conversion.convert import convert, unfinished
from mlx_qwen35.conversion.gguf.outtype import split_name
from mlx_qwen35.conversion.gguf.tensors import GgufPiece
from mlx_qwen35.conversion.partial import container_of
from mlx_qwen35.conversion.write import WriteError
from mlx_qwen35.errors import ArgumentError, CheckpointError
from tests.checkpoints import random_tensors, write_checkpoint
from tests.conversion.gguf.expected import write_companions
from tests.conversion.gguf.test_values import config_of, source_of


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "a"
    source_of(folder, config_of("moe"), "bfloat16")
    return folder


@pytest.mark.parametrize(("changes", "message"), [
    ({"linear_key_head_dim": 16}, "runs only models in which they are equal"),
    ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "mscale": 1.0}}, "YaRN with mscale"),
], ids=["heads", "yarn"])  # fmt: skip
def test_geometry(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = config_of("dense", **changes)
    source_of(tmp_path / "a", config)
    for outtype in ("bf16", "q8_0"):
        with pytest.raises(CheckpointError, match=message):
            convert(tmp_path / "a", tmp_path / "b.gguf", outtype=outtype)
    with pytest.raises(CheckpointError, match=message):  # before a download too
        check_request(tmp_path / "b.gguf", ModelConfig.from_dict(config))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_the_demo_says_why(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="convert it to an MLX folder instead"):
        mlx_qwen35.convert(Path(mlx_qwen35.__file__).parent / "demo", tmp_path / "demo.gguf")


def test_mxfp4_is_for_experts(tmp_path: Path) -> None:
    source_of(tmp_path / "a", config_of("dense"))
    with pytest.raises(CheckpointError, match="take --outtype q4_0"):
        convert(tmp_path / "a", tmp_path / "a-mxfp4.gguf")


@pytest.mark.parametrize(("target", "options", "message"), [
    ("b", {"outtype": "q8_0"}, "give a target that ends in .gguf"),
    ("b.gguf", {"outtype": "q4_k_m"}, "give that file to llama-quantize"),
    ("b.gguf", {"group_size": 32, "recipe": "uniform"}, "group_size, recipe"),
    ("b.gguf", {"dtype": "float16"}, "dtype"),
    ("b.gguf", {"verify": True}, "verify"),
    ("b.gguf", {"pack_experts": True}, "pack_experts"),
])  # fmt: skip
def test_arguments(source: Path, tmp_path: Path, target: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        mlx_qwen35.convert(source, tmp_path / target, **options)
    assert not list(tmp_path.iterdir())


def test_the_name_says_the_type() -> None:
    names = {"a-Q8_0": ("a", "Q8_0"), "a.b.q4_1": ("a.b", "Q4_1"), "a_BF16": ("a", "BF16"), "Q4_0": ("Q4_0", None),
             "a-4bit": ("a-4bit", None), "a-bf16-mxfp4": ("a-bf16", "MXFP4")}  # fmt: skip
    assert {name: split_name(f"{name}.gguf") for name in names} == names


def test_half_of_an_mtp_layer(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 3)
    del tensors["mtp.layers.0.self_attn.k_proj.weight"]
    write_checkpoint(tmp_path / "a", config, tensors)
    write_companions(tmp_path / "a", 270)
    with pytest.raises(CheckpointError, match="k_proj.weight is not as llama.cpp needs it"):
        convert(tmp_path / "a", tmp_path / "b.gguf")


def test_what_float16_does_not_hold(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 3)
    tensors["model.language_model.layers.0.mlp.up_proj.weight"][3, 5] = 1e5
    write_checkpoint(tmp_path / "a", config, tensors)
    write_companions(tmp_path / "a", 270)
    with pytest.raises(CheckpointError, match=r"up_proj.*F16 does not hold: take --outtype bf16"):
        convert(tmp_path / "a", tmp_path / "b-f16.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    convert(tmp_path / "a", tmp_path / "b.gguf")


def test_nan_is_refused_with_its_place(tmp_path: Path) -> None:
    config = config_of("dense")
    tensors = random_tensors(config, 3)
    tensors["model.language_model.layers.2.linear_attn.in_proj_z.weight"][70, 5] = np.nan
    write_checkpoint(tmp_path / "a", config, tensors)
    write_companions(tmp_path / "a", 270)
    with pytest.raises(CheckpointError, match=r"in_proj_z.*NaN.*\[70, 5\]"):
        convert(tmp_path / "a", tmp_path / "b.gguf", outtype="q8_0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_what_exists_is_replaced_only_on_demand(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "b.gguf"
    convert(source, target, outtype="q8_0")
    before = target.read_bytes()
    with pytest.raises(CheckpointError, match="exists already"):
        convert(source, target, outtype="bf16")
    target.unlink()
    with pytest.raises(CheckpointError, match="b-mmproj.gguf exists already"):
        convert(source, target, outtype="bf16")
    convert(source, target, outtype="q8_0", overwrite=True)
    assert target.read_bytes() == before
    target.write_text("a text")
    with pytest.raises(CheckpointError, match="is no GGUF file and is not overwritten"):
        convert(source, target, outtype="q8_0", overwrite=True)


class Stop(Exception):
    pass


def stopping(monkeypatch: pytest.MonkeyPatch, after: int, error: type[BaseException] = Stop) -> None:
    """The pieces after so many fail."""
    made = GgufPiece.write
    count = iter(range(10**9))

    def write(piece: GgufPiece) -> tuple[list[str], tuple[int, int]]:
        if next(count) >= after:
            raise error("no")
        return made(piece)

    monkeypatch.setattr(GgufPiece, "write", write)


def test_an_interrupted_conversion_goes_on(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = convert(source, tmp_path / "w" / "b.gguf", outtype="q4_0")
    target = tmp_path / "b.gguf"
    with monkeypatch.context() as patched, pytest.raises(Stop):
        stopping(patched, 30)
        convert(source, target, outtype="q4_0")
    assert not target.exists()
    assert unfinished(target)
    with pytest.raises(CheckpointError, match="an unfinished conversion"):
        convert(source, target, outtype="q4_0")
    with pytest.raises(CheckpointError, match="outtype Q4_0 and not Q8_0"):
        convert(source, target, outtype="q8_0", resume=True)
    hidden = container_of(target) / "folder" / "b.gguf"
    with hidden.open("r+b") as file:  # what the disk lost is made again
        file.seek(len(hidden.read_bytes()) // 2)
        file.write(bytes(20000))
    written = []
    with monkeypatch.context() as patched:
        made = GgufPiece.write
        patched.setattr(GgufPiece, "write", lambda piece: written.append(piece.name) or made(piece))
        convert(source, target, outtype="q4_0", resume=True)
    assert 0 < len(written) < 130
    for name in ("b.gguf", "b-mmproj.gguf"):
        assert (tmp_path / name).read_bytes() == (whole.parent / name).read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-mmproj.gguf", "b.gguf", "w"]


def test_a_kill_between_the_two_names(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "b.gguf"
    moved = Path.replace

    def replace(path: Path, to: Path) -> Path:
        if to == target:
            raise KeyboardInterrupt
        return moved(path, to)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", replace)
        convert(source, target, outtype="q8_0")
    assert not target.exists()
    assert (tmp_path / "b-mmproj.gguf").exists()
    convert(source, target, outtype="q8_0", resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b-mmproj.gguf", "b.gguf"]


def test_a_full_disk_says_so(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        with pytest.raises(WriteError, match="a smaller type"):
            convert(source, tmp_path / "b.gguf")
    with monkeypatch.context() as patched, pytest.raises(WriteError):
        stopping(patched, 20, WriteError)
        convert(source, tmp_path / "b.gguf")
    convert(source, tmp_path / "b.gguf", resume=True)


def test_progress_counts_the_source(source: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    mlx_qwen35.convert(source, tmp_path / "b.gguf", on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_the_command(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlx_qwen35.cli.main import main

    assert main(["convert", str(source), str(tmp_path / "b-Q8_0.gguf")]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "b-Q8_0.gguf")
    assert main(["convert", str(source), str(tmp_path / "c.gguf"), "-q"]) != 0
    assert "--outtype q8_0" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "c.gguf"), "--outtype", "q5_k"]) != 0
    assert "llama-quantize" in capsys.readouterr().err


def test_an_adapter_is_merged(source: Path, tmp_path: Path) -> None:
    """The file is that of the checkpoint into which the adapter was merged."""
    import mlx.core as mx

    adapter = tmp_path / "adapter"
    adapter.mkdir()
    rng = np.random.default_rng(0)
    name = "language_model.model.layers.3.self_attn.o_proj"
    leaves = {"lora_a": (96, 4), "lora_b": (4, 64)}
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {
        f"{name}.{leaf}": mx.array(rng.standard_normal(shape).astype(np.float32)) for leaf, shape in leaves.items()
    })  # fmt: skip
    settings = {"fine_tune_type": "lora", "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0}}
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    merged = convert(source, tmp_path / "merged", bits=None, dtype="float32", adapter_path=adapter)
    one = convert(merged, tmp_path / "1" / "b.gguf", outtype="q8_0")
    two = convert(source, tmp_path / "2" / "b.gguf", outtype="q8_0", adapter_path=adapter)
    plain = convert(source, tmp_path / "3" / "b.gguf", outtype="q8_0")
    assert two.read_bytes() == one.read_bytes() != plain.read_bytes()
