"""Which folder a reference means, and what load() puts together."""

from pathlib import Path

import pytest

import mlx_qwen35
from mlx_qwen35 import library
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import loading
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint without a tokenizer, and a processor that only remembers what it was given."""
    config = tiny_config("dense")
    monkeypatch.setattr(loading.Processor, "from_folder", classmethod(lambda cls, *given: given))
    return write_checkpoint(tmp_path / "model", config, random_tensors(config))


def test_load(folder: Path) -> None:
    seen: list[int] = []
    model, processor = mlx_qwen35.load(
        folder, dtype="float16", context_length=50, on_progress=lambda done, total: seen.append(total - done)
    )
    assert processor == (folder, model.config)
    assert model.config.text.max_position_embeddings == 50
    assert str(model.norm.weight.dtype) == "mlx.core.float16"
    assert seen[-1] == 0
    assert library.load_model is mlx_qwen35.load_model


def test_the_processor_alone(folder: Path) -> None:
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    found, config = mlx_qwen35.load_processor(folder, context_length=50)
    assert found == folder and config.text.max_position_embeddings == 50
    with pytest.raises(CheckpointError, match="is no folder"):
        mlx_qwen35.load_processor("./no/such")


def test_a_broken_tokenizer_is_found_before_the_weights_are_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*given: object) -> None:
        raise CheckpointError("no tokenizer")

    monkeypatch.setattr(loading.Processor, "from_folder", broken)
    seen: list[int] = []
    with pytest.raises(CheckpointError, match="no tokenizer"):
        mlx_qwen35.load(folder, on_progress=lambda done, total: seen.append(done))
    assert seen == []


def test_demo(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlx_qwen35, "__file__", str(folder.parent / "__init__.py"))
    with pytest.raises(CheckpointError, match="holds no demo checkpoint"):
        mlx_qwen35.load()
    folder.rename(folder.parent / "demo")
    assert library.demo_folder() == library.find(None) == folder.parent / "demo"
    assert mlx_qwen35.load()[1][0] == folder.parent / "demo"
