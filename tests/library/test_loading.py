"""Which folder a reference means, and what load() puts together."""

import gc
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_qwen35
from mlx_qwen35 import library
from mlx_qwen35.errors import CheckpointError, Qwen35Error
from mlx_qwen35.library import loading
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.machine import Machine


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


def test_unload_gives_the_memory_back(machine: Machine) -> None:
    gc.collect()
    before = mx.get_active_memory()
    model, processor = mlx_qwen35.load()
    mx.eval(model(mx.array([[1, 2, 3]])))
    held = mx.get_active_memory() - before
    assert held >= mlx_qwen35.estimate().weights.total
    model.unload()
    assert mx.get_active_memory() - before < held / 100
    assert mx.get_cache_memory() == 0
    uses = (
        lambda: model(mx.array([[1]])),
        lambda: model.hidden(mx.array([[1]])),
        lambda: model.make_cache(),
        lambda: model.layers,
        lambda: mlx_qwen35.generate(model, processor, "hi"),
    )
    for use in uses:
        with pytest.raises(Qwen35Error, match="this model was unloaded.*load it again"):
            use()
    assert model.config.text.vocab_size and not hasattr(model, "lm_head")
    model.unload()


@pytest.mark.parametrize("stop", [ValueError("enough"), KeyboardInterrupt()])
def test_cancelled_while_weights_are_read(machine: Machine, stop: BaseException) -> None:
    gc.collect()
    before = mx.get_active_memory()
    seen: list[float] = []

    def on_progress(done: int, total: int) -> None:
        seen.append(done / total)
        if done > total / 2:
            raise stop

    with pytest.raises(type(stop)) as kept:
        mlx_qwen35.load(on_progress=on_progress)
    assert kept.value is stop and 0.5 < seen[-1] < 1  # the error is still held, with all of its frames
    assert mx.get_active_memory() - before < 500_000
