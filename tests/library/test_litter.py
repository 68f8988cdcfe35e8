"""What macOS leaves among files, "._name", .DS_Store and __MACOSX, is nobody's data: not read, listed or copied."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import missing_shards
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find, hub_cache, lmstudio, load_model
from mlx_qwen35.library.listing import list_models
from mlx_qwen35.library.stored import Stored
from tests.fake_hub import Hub
from tests.machine import Machine, checkpoint, gguf

FORK = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        "  # how an AppleDouble file begins


def litter(folder: Path) -> None:
    """Put it beside every file, and into a folder as archives have it."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    for path in files:
        path.with_name(f"._{path.name}").write_bytes(FORK)
        (folder / "__MACOSX").mkdir(exist_ok=True)
        (folder / "__MACOSX" / f"._{path.name}").write_bytes(FORK)
    for inside in {folder, *(path.parent for path in files)}:
        (inside / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    folder = checkpoint(tmp_path / "clean", shards=2)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def test_loading(clean: Path) -> None:
    index = clean / "model.safetensors.index.json"
    expected = np.array(load_model(clean)(mx.array([[1, 2, 3]])))
    litter(clean)
    for _ in range(2):  # with an index, and by the numbers of shards
        np.testing.assert_array_equal(np.array(load_model(clean)(mx.array([[1, 2, 3]]))), expected)
        assert missing_shards(clean) == []
        index.unlink(missing_ok=True)
    for path in clean.glob("model*.safetensors"):
        path.unlink()
    with pytest.raises(CheckpointError, match=r"holds no model\*.safetensors: "):  # no ._ file is named as one
        load_model(clean)


def test_converting(clean: Path, tmp_path: Path) -> None:
    expected = contents(convert(clean, tmp_path / "a", dtype="float16"))
    litter(clean)
    assert contents(convert(clean, tmp_path / "b", dtype="float16")) == expected


def test_a_target_that_finder_has_shown(clean: Path, tmp_path: Path) -> None:
    target = tmp_path / "new"
    target.mkdir()
    (target / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    assert "config.json" in contents(convert(clean, target, dtype="float16", overwrite=True))
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").touch()
    with pytest.raises(CheckpointError, match="is no checkpoint and is not overwritten"):
        convert(clean, other, dtype="float16", overwrite=True)


def test_listing(machine: Machine, tmp_path: Path) -> None:
    folder = machine.lmstudio("someone/Qwen3.5-1B")
    machine.cached("someone/Qwen3.5-2B")
    before = [(model.name, model.nbytes, model.problem) for model in list_models()]
    assert len(before) == 3
    litter(machine.home)
    (machine.home / ".lmstudio" / "models" / "__MACOSX" / "Qwen3.5-1B").mkdir(parents=True)
    refs = machine.home / ".cache/huggingface/hub/models--someone--Qwen3.5-2B/refs"
    (refs / "._main").write_bytes(FORK)
    assert [(model.name, model.nbytes, model.problem) for model in list_models()] == before
    assert [stored.folder for stored in lmstudio.models()] == [folder]
    assert len(hub_cache.models()) == 1
    only = tmp_path / "only"
    (only / "sub").mkdir(parents=True)
    (only / "sub" / "._model.safetensors").write_bytes(FORK)
    assert [(model.name, model.nbytes, model.problem) for model in list_models(only)] == before


def test_gguf(tmp_path: Path) -> None:
    folder = gguf(tmp_path / "model")
    assert Stored("model", folder, "folder").is_gguf
    (folder / "._model.safetensors").write_bytes(FORK)
    assert Stored("model", folder, "folder").is_gguf
    (folder / "model-Q4_K_M.gguf").rename(folder / "._model.gguf")
    assert not Stored("model", folder, "folder").is_gguf
    with pytest.raises(CheckpointError, match="holds a checkpoint's files"):
        ModelConfig.from_folder(folder)


def test_downloading(machine: Machine, hub: Hub, clean: Path) -> None:
    expected = contents(clean)
    litter(clean)
    hub.publish("someone/Qwen3.5-1B", clean)
    assert contents(find("someone/Qwen3.5-1B")) == expected
