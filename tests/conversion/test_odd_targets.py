"""Targets that are in the way, or no place for a checkpoint: a CheckpointError at once, or all work kept for later."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35.conversion.convert import convert, unfinished
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import write_fp8
from tests.checkpoint.test_fp8 import spoil
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    config = tiny_config("dense", layer_types=["linear_attention"])
    return write_checkpoint(tmp_path / "source", config, random_tensors(config))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("there", [True, False], ids=["to a folder", "to nothing"])
def test_links_are_left_alone(source: Path, tmp_path: Path, there: bool) -> None:
    """What they lead to may lie on another disk, and was not named."""
    (tmp_path / "out").mkdir()
    real, link = tmp_path / "real", tmp_path / "out/link"
    if there:
        convert(source, real)
    link.symlink_to(real)
    before = contents(real)
    with pytest.raises(CheckpointError, match=f"link is a link to {real}: give the folder that it leads to"):
        convert(source, link, bits=8, overwrite=True)
    assert link.is_symlink() and contents(real) == before and os.listdir(tmp_path / "out") == ["link"]


def test_here(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = convert(source, tmp_path / "here/inner")
    before = contents(tmp_path / "here")
    for place, way in ((here, "."), (here, "..")):
        monkeypatch.chdir(place)
        with pytest.raises(CheckpointError):
            convert(source, way, bits=8, overwrite=True)
    assert contents(tmp_path / "here") == before and os.listdir(tmp_path / "here") == ["inner"]


@pytest.mark.parametrize("name", ["n" * 255, "\u00fc" * 127, "n" * 248])
def test_the_longest_names(source: Path, tmp_path: Path, name: str) -> None:
    """There is no room for what is put around the name of unfinished work."""
    assert os.listdir(convert(source, tmp_path / "out" / name).parent) == [name]


def test_a_name_too_long(source: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="a name of more than 255 bytes, which disks do not take: shorten it"):
        convert(source, tmp_path / "out" / ("n" * 256))
    assert os.listdir(tmp_path) == ["source"]


def once(act: Callable[[], Any]) -> Callable[[int, int], None]:
    """As on_progress: `act` in the middle of the work."""
    done: list[Any] = []

    def report(count: int, total: int) -> None:
        if count > total // 3 and not done:
            done.append(act() or True)

    return report


def test_what_appears_meanwhile_is_not_touched(source: Path, tmp_path: Path) -> None:
    target, reference = tmp_path / "target", contents(convert(source, tmp_path / "reference"))

    def appear() -> None:
        target.mkdir()
        (target / "thesis.txt").write_text("years of work")

    with pytest.raises(CheckpointError, match="appeared during the conversion: move it, and go on with --resume"):
        convert(source, target, on_progress=once(appear))
    assert contents(target) == {"thesis.txt": b"years of work"} and unfinished(target)
    target.rename(tmp_path / "moved")
    assert contents(convert(source, target, resume=True)) == reference
    assert sorted(os.listdir(tmp_path)) == ["moved", "reference", "source", "target"]


def test_a_name_that_cannot_be_given(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where the old target belongs to somebody else; the work is kept."""
    target = convert(source, tmp_path / "target")
    before, reference = contents(target), contents(convert(source, tmp_path / "reference", bits=8))
    rename = Path.rename

    def refuse(path: Path, to: Path) -> Path:
        if path == target:
            raise PermissionError(13, "Permission denied", str(path))
        return rename(path, to)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(CheckpointError, match="target cannot be written .Permission denied.*Go on with --resume"):
        convert(source, target, bits=8, overwrite=True)
    assert contents(target) == before and unfinished(target)
    monkeypatch.undo()
    assert contents(convert(source, target, bits=8, overwrite=True, resume=True)) == reference
    assert sorted(os.listdir(tmp_path)) == ["reference", "source", "target"]


@pytest.mark.parametrize("damaged", [b"\0" * 40, b"null", b"[]", b'{"piece"', b"\xff\xfe"], ids=repr)
def test_damaged_journal(source: Path, tmp_path: Path, damaged: bytes) -> None:
    """As a power failure may leave it."""
    target = tmp_path / "target"

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(source, target, on_progress=once(stop))
    journal = tmp_path / ".target.partial/journal"
    first, rest = journal.read_bytes().split(b"\n", 1)
    for raw in (first + b"\n" + damaged + b"\n" + rest, damaged + b"\n" + rest):
        journal.write_bytes(raw)
        with pytest.raises(CheckpointError, match="journal is damaged .*discard that work with --overwrite"):
            convert(source, target, resume=True)
    convert(source, target, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["source", "target"]


def test_a_scale_that_is_too_large_is_named(tmp_path: Path) -> None:
    """Finite in FP8 and its scale, and not in their product; of the expert that has it."""
    name = "model.language_model.layers.1.mlp.experts.2.up_proj.weight"
    write_fp8(tmp_path / "a", change=spoil(f"{name}_scale_inv", (0, 0), 0x7F7F))
    with pytest.raises(CheckpointError, match="layers.1.mlp.experts.2.up_proj"):
        convert(tmp_path / "a", tmp_path / "b")
    assert os.listdir(tmp_path) == ["a"]
