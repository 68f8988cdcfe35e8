"""The files beside the weights: each of them is in the target, or one error names the one that is not."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config("dense", layer_types=["linear_attention"])
    write_checkpoint(tmp_path / "source", config, random_tensors(config))
    (tmp_path / "source/tokenizer.json").write_text("{}")
    return tmp_path / "source"


def refuse(monkeypatch: pytest.MonkeyPatch, method: str, path: Path, number: int = errno.EACCES) -> None:
    """Path.`method` of this one path fails; by its mode it would not, for root."""
    original = getattr(Path, method)

    def failing(self: Path, *args: Any, **kwargs: Any) -> Any:
        if self == path:
            raise OSError(number, os.strerror(number), str(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Path, method, failing)


def test_links_are_followed(source: Path, tmp_path: Path) -> None:
    """As in a snapshot of the Hub's cache."""
    (tmp_path / "blob").write_text("text")
    (source / "vocab.txt").symlink_to(tmp_path / "blob")
    (tmp_path / "folder").mkdir()
    (source / "folder.json").symlink_to(tmp_path / "folder")
    out = convert(source, tmp_path / "out")
    assert (out / "vocab.txt").read_text() == "text" and not (out / "vocab.txt").is_symlink()
    assert not (out / "folder.json").exists()


@pytest.mark.parametrize("to", ["../blobs/0123", "merges.txt"], ids=["to nothing", "to itself"])
def test_a_link_that_leads_nowhere(source: Path, tmp_path: Path, to: str) -> None:
    (source / "merges.txt").symlink_to(to)
    with pytest.raises(CheckpointError, match=f"source/merges.txt is a link to {to}, which is not there: finish the"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]


def test_one_that_cannot_be_read_is_named(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, "open", source / "tokenizer.json")
    with pytest.raises(CheckpointError, match="source/tokenizer.json cannot be read"):
        convert(source, tmp_path / "out")
    assert os.listdir(tmp_path) == ["source"]
