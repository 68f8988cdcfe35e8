"""Expert records, read here by a few lines of their own: every one is its expert, whole, in place and checked."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import open_folder, read
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion import pipeline, task
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.partial import container_of
from mlx_qwen35.conversion.write import SafetensorsFile
from mlx_qwen35.errors import CheckpointError
from tests.conversion.test_convert import source_of
from tests.conversion.test_resume import begun, contents

NUMPY = {"U32": np.uint32, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 50_000)
    monkeypatch.setattr(pipeline, "workers", lambda: 2)
    monkeypatch.setattr(SafetensorsFile, "sync", lambda self: None)


def read_record(path: Path, expert: int) -> dict[str, np.ndarray]:
    """One pread, as streaming does it; the record is held against its checksum."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        about, records = header["__metadata__"], header["records"]
        assert (about["format"], about["version"]) == ("mlx-qwen35-experts", "1") and records["dtype"] == "U8"
        count, size = records["shape"]
        offset = 8 + length + records["data_offsets"][0] + expert * size
        assert offset % 16384 == size % 16384 == 0 and expert < count
        data = os.pread(file.fileno(), size, offset)
    assert len(data) == size and hashlib.sha256(data).hexdigest() == json.loads(about["sha256"])[expert]
    found = {}
    for part in json.loads(about["parts"]):
        assert part["offset"] % 64 == 0
        values = np.frombuffer(data, NUMPY[part["dtype"]], int(np.prod(part["shape"])), part["offset"])
        assert values.nbytes == part["nbytes"]
        found[part["name"]] = values.reshape(part["shape"])
    return found


@pytest.mark.parametrize("how", [{}, {"mode": "mxfp8"}, {"bits": None}, {"recipe": "mixed_3_6"}], ids=str)
def test_every_record(tmp_path: Path, how: dict[str, Any]) -> None:
    """Equal to the expert's slices of the shards, in the order gate, up, down."""
    out = convert(source_of(tmp_path / "a", dtype="bfloat16"), tmp_path / "b", pack_experts=True, **how)
    shards = open_folder(out).entries
    assert len(list((out / "experts").iterdir())) == 4
    for layer in range(4):
        prefix = f"language_model.model.layers.{layer}.mlp.switch_mlp."
        slices = {name.removeprefix(prefix): read(entry) for name, entry in shards.items() if name.startswith(prefix)}
        for expert in range(8):
            record = read_record(out / f"experts/layer-{layer:05d}.safetensors", expert)
            assert record.keys() == slices.keys()
            assert list(dict.fromkeys(name.split(".")[0] for name in record)) == ["gate_proj", "up_proj", "down_proj"]
            assert all(np.array_equal(record[name], slices[name][expert]) for name in record)


def test_the_rest_is_the_same(tmp_path: Path) -> None:
    """Loaders see no difference, and the files are safetensors to anybody."""
    source = source_of(tmp_path / "a")
    plain, packed = convert(source, tmp_path / "b"), convert(source, tmp_path / "c", pack_experts=True)
    found = contents(packed)
    records = {name for name in found if name.startswith("experts")}
    assert len(records) == 4 and {name: found[name] for name in found.keys() - records} == contents(plain)
    array = mx.load(str(packed / "experts/layer-00000.safetensors"))["records"]
    assert array.shape[0] == 8 and array.dtype == mx.uint8
    tokens = mx.array([[3, 1, 4, 1, 5]])
    assert mx.array_equal(load_model(plain)(tokens), load_model(packed)(tokens))
    again = convert(packed, tmp_path / "d", pack_experts=True)  # a source that has all but what is packed
    assert contents(again) == found


def test_resumed(tmp_path: Path) -> None:
    """At any moment, also with records that are damaged by then."""
    source = source_of(tmp_path / "a")
    whole = contents(convert(source, tmp_path / "whole", pack_experts=True))
    for number, part in enumerate((0.3, 0.85, 0.95)):
        target = begun(source, tmp_path / f"{number}", part, pack_experts=True)
        for path in (container_of(target) / "folder/experts").glob("*"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        with pytest.raises(CheckpointError, match="begun with pack_experts True and not False"):
            convert(source, target, resume=True)
        assert contents(convert(source, target, resume=True, verify=True, pack_experts=True)) == whole


def test_no_experts(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="has no experts to pack"):
        convert(source_of(tmp_path / "a", "dense"), tmp_path / "b", pack_experts=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
