"""What verify finds: nothing in a good conversion, and each kind of damage by name."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion import layerwise, piece, task, verify
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.verify import Verification
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.checkpoint.test_quantized import write_quantized
from tests.conversion.test_convert import source_of


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 50_000)


def report_of(source: Path, target: Path, **options: Any) -> Verification:
    found: list[Verification] = []
    convert(source, target, verify=found.append, **options)
    return found[0]


def test_unquantized_is_equal(tmp_path: Path) -> None:
    report = report_of(source_of(tmp_path / "a"), tmp_path / "b", bits=None)
    assert (report.quantized, report.worst, report.difference, report.agreement) == (0, None, 0, 1)
    assert abs(report.divergence) < 1e-6 and report.nbytes > 1_000_000
    assert "equal to the source's" in str(report)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_quantized_is_measured(tmp_path: Path, kind: str) -> None:
    """The fewer bits, the more is lost; the figures are those of the two models."""
    source = source_of(tmp_path / "a", kind)
    reports = [report_of(source, tmp_path / str(bits), bits=bits, recipe="uniform") for bits in (2, 4, 8)]
    for one, two in zip(reports, reports[1:], strict=False):
        assert one.worst[1] > two.worst[1] > 0 and one.difference > two.difference > 0
        assert one.divergence > two.divergence > 0
    assert reports[0].quantized == reports[2].quantized > 20 and "relative error" in str(reports[0])
    tokens = mx.array([np.random.default_rng(0).integers(0, 96, 64).tolist()])
    a, b = (load_model(folder)(tokens) for folder in (source, tmp_path / "4"))
    assert mx.abs(a - b).max().item() == reports[1].difference


@pytest.mark.parametrize("what", [
    lambda folder: write_fp8(folder, "moe"), lambda folder: write_gptq(folder, "moe"),
    lambda folder: write_quantized(folder, "moe", {"group_size": 64, "bits": 4, "mode": "affine"}),
    lambda folder: write_quantized(folder, "dense", {"group_size": 32, "bits": 8, "mode": "mxfp8"}),
], ids=["fp8", "gptq", "mlx", "mxfp8"])  # fmt: skip
@pytest.mark.parametrize("target", [{"bits": None}, {"bits": 6, "group_size": 32, "recipe": "uniform"}], ids=str)
def test_every_kind_of_source(tmp_path: Path, what: Any, target: dict[str, Any]) -> None:
    what(tmp_path / "a")
    report = report_of(tmp_path / "a", tmp_path / "b", **target)
    assert (report.quantized > 0) == (target["bits"] is not None)
    assert report.worst is None or 0 < report.worst[1] < 0.05


def test_logits_are_those_of_the_whole_model(tmp_path: Path) -> None:
    for kind in ("dense", "moe"):
        out = convert(source_of(tmp_path / kind, kind), tmp_path / f"{kind}4", mode="mxfp4")
        tokens = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
        assert mx.array_equal(layerwise.logits(open_source(out), tokens, mx.float32), load_model(out)(tokens))


def test_bytes_that_the_disk_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing gets the target's name; what was lost is written again by --resume."""
    source, target = source_of(tmp_path / "a"), tmp_path / "b"
    write = SafetensorsFile.write

    def bad(self: SafetensorsFile, name: str, data: memoryview, offset: int) -> None:
        write(self, name, memoryview(bytes(len(data))) if "k_proj.scales" in name else data, offset)

    with monkeypatch.context() as patched:
        patched.setattr(SafetensorsFile, "write", bad)
        with pytest.raises(CheckpointError, match="k_proj.weight in model.safetensors does not read back .*--resume"):
            convert(source, target, verify=True)
    assert not target.exists()
    convert(source, target, verify=True, resume=True)
    load_model(target)


def test_tensors_in_the_wrong_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checksums are right, for what was meant; only a look by name sees it."""
    source = source_of(tmp_path / "a")
    write, read = SafetensorsFile.write, SafetensorsFile.read
    swapped = {"up_proj": "gate_proj", "gate_proj": "up_proj"}

    def other(name: str) -> str:
        for one, two in swapped.items():
            if f"layers.1.mlp.switch_mlp.{one}" in name:
                return name.replace(one, two)
        return name

    monkeypatch.setattr(SafetensorsFile, "write", lambda self, name, *rest: write(self, other(name), *rest))
    monkeypatch.setattr(SafetensorsFile, "read", lambda self, name, *rest: read(self, other(name), *rest))
    with pytest.raises(CheckpointError, match="is not what .*gate_up_proj .* becomes"):
        convert(source, tmp_path / "b", bits=None, verify=True)
    with pytest.raises(CheckpointError, match=r"layers.1.mlp.experts.(gate|up)_proj.weight lost 14\d%"):
        convert(source, tmp_path / "c", verify=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_progress_counts_the_looks(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    convert(source_of(tmp_path / "a"), tmp_path / "b", verify=True, on_progress=lambda *step: seen.append(step))
    assert seen[0][0] == 0 and seen[-1][0] == seen[-1][1] and sorted(seen) == seen


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify.os, "sysconf", lambda name: 100)
    with pytest.raises(CheckpointError, match="verifying needs one layer .* convert without verify"):
        convert(source_of(tmp_path / "a"), tmp_path / "b", verify=True)
    assert not (tmp_path / "b").exists()


def test_checksums_are_of_the_bytes() -> None:
    """Whatever a disk may do to a piece: lose a stretch, cut it, mix up blocks or words, change a bit anywhere."""
    data = np.random.default_rng(0).bytes(5 * 4096 + 77)
    good = piece.checksum(data)
    assert piece.checksum(memoryview(bytearray(data))) == good
    bad = {data[:4096] + bytes(4096) + data[8192:], data[:-1], data + b"\0", data[4096:] + data[:4096]}
    bad.add(data[8:16] + data[:8] + data[16:])
    bad.add(data[4096:8192] + data[:4096] + data[8192:])
    for at in (0, 4095, 4096, 12345, 5 * 4096, len(data) - 1):
        bad.add(data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :])
    assert good not in {piece.checksum(each) for each in bad}

def test_logits_that_are_no_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are all right give them where the arithmetic is not: that is no difference of 0."""
    plain = layerwise.logits
    monkeypatch.setattr(layerwise, "logits", lambda *arguments: plain(*arguments) * float("nan"))
    with pytest.raises(CheckpointError, match="logits that are no numbers"):
        convert(source_of(tmp_path, "dense"), tmp_path / "target", bits=None, verify=True)
