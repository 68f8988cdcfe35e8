"""Headers of GGUF files: what gguf-py writes is read as gguf-py reads it, and what is damaged is named."""

import struct
import tracemalloc
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter

from mlx_qwen35.checkpoint.gguf.container import Array, header_size, read_gguf
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.gguf.building import finish
from tests.soak import examples


def small(path: Path, tensors: int = 3, split: int = 0, alignment: int = 32) -> Path:
    """A file with a key of every kind and a few tensors of odd sizes."""
    writer = GGUFWriter(path, "qwen35", split_max_tensors=split)
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    ones = {"uint8": 7, "int8": -7, "uint16": 777, "int16": -777, "uint32": 1 << 31, "int32": -9, "uint64": 1 << 40}
    for kind, value in {**ones, "int64": -(1 << 40), "bool": True}.items():
        getattr(writer, f"add_{kind}")(f"one.{kind}", value)
    writer.add_float32("one.float32", 0.1)
    writer.add_float64("one.float64", 0.1)
    writer.add_string("one.string", "日本 ok")
    writer.add_array("some.strings", ["", "a", "ééé", "b" * 300])
    writer.add_array("some.counts", [1, 2, 3])
    writer.add_array("some.flags", [True, False, True])
    writer.add_array("some.floats", [0.5, 1.5])
    for number in range(tensors):
        data = np.arange(5 + number, dtype=np.float32)
        writer.add_tensor(f"t{number}", np.stack([data] * 3))
    writer.add_tensor("blocks", np.arange(68, dtype=np.uint8).reshape(2, 34), raw_dtype=GGMLQuantizationType.Q8_0)
    finish(writer)
    return path


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_read_as_gguf_py_reads(tmp_path, alignment):
    path = small(tmp_path / "a.gguf", alignment=alignment)
    found, theirs = read_gguf(path), GGUFReader(path)
    for name, field in theirs.fields.items():
        if name.startswith("GGUF."):
            continue
        value = found.metadata[name]
        assert (value.values() if isinstance(value, Array) else value) == field.contents(), name
    assert len(found.tensors) == len(theirs.tensors) == 4
    for tensor in theirs.tensors:
        mine = found.tensors[tensor.name]
        assert mine.kind.name == tensor.tensor_type.name
        assert mine.shape == tuple(reversed([int(n) for n in tensor.shape]))
        assert (mine.offset, mine.nbytes) == (tensor.data_offset, tensor.n_bytes)
    assert found.files == (path,)


def test_files_of_a_split_model_are_one(tmp_path):
    small(tmp_path / "m.gguf", tensors=5, split=2)
    first = tmp_path / "m-00001-of-00003.gguf"
    found = read_gguf(first)
    assert [path.name for path in found.files] == [f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert set(found.tensors) == {"t0", "t1", "t2", "t3", "t4", "blocks"}
    assert {tensor.file.name for tensor in found.tensors.values()} == {path.name for path in found.files}
    with pytest.raises(CheckpointError, match="not the first of its 3 files"):
        read_gguf(tmp_path / "m-00002-of-00003.gguf")
    (tmp_path / "m-00003-of-00003.gguf").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of 3 files \(m-00003-of-00003.gguf\): finish the download"):
        read_gguf(first)


def test_files_of_two_split_models_are_not_mixed(tmp_path):
    small(tmp_path / "m.gguf", tensors=5, split=2)
    small(tmp_path / "n.gguf", tensors=3, split=2)
    with pytest.raises(CheckpointError, match="files of two models lie in one folder"):
        (tmp_path / "n-00001-of-00002.gguf").rename(tmp_path / "m-00002-of-00003.gguf")
        read_gguf(tmp_path / "m-00001-of-00003.gguf")


@pytest.mark.parametrize("others", [32, 64])
def test_other_files_are_aligned_as_the_first_or_by_default(tmp_path, others):
    """Only the first says how. gguf-py pads all alike, llama-gguf-split the others by 32."""

    def write(folder: Path, letters: int, alignment: int) -> list[Path]:
        folder.mkdir(exist_ok=True)
        writer = GGUFWriter(folder / "m.gguf", "qwen35", split_max_tensors=2)
        if alignment != 32:
            writer.add_custom_alignment(alignment)
        for number in range(4):
            writer.add_tensor("abcd"[number] * letters, np.full(5 + number, number, np.float32))
        finish(writer)
        return sorted(folder.glob("m-*.gguf"))

    for letters in range(1, 40):
        first, second = write(tmp_path / "a", letters, 64)
        if others == 32:
            second.write_bytes(write(tmp_path / "b", letters, 32)[1].read_bytes())
        found = read_gguf(first).tensors
        for number in range(4):
            tensor = found["abcd"[number] * letters]
            data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            assert data == np.full(5 + number, number, np.float32).tobytes()


def test_empty_keys_are_as_if_they_were_not_there(tmp_path):
    """gguf-py does not write them; others may."""
    path = small(tmp_path / "a.gguf")
    found, whole, end = read_gguf(path), path.read_bytes(), header_size(path)
    start = min(tensor.offset for tensor in found.tensors.values())
    (count,) = struct.unpack_from("<Q", whole, 16)
    for kind, value in ((8, bytes(8)), (9, struct.pack("<IQ", 8, 0)), (9, struct.pack("<IQ", 5, 0))):
        key = struct.pack("<Q", 12) + b"some.nothing" + struct.pack("<I", kind) + value
        header = whole[:16] + struct.pack("<Q", count + 1) + key + whole[24:end]
        (tmp_path / "b.gguf").write_bytes(header + bytes(-len(header) % 32) + whole[start:])
        assert header_size(tmp_path / "b.gguf") == len(header)
        assert read_gguf(tmp_path / "b.gguf").metadata.keys() == found.metadata.keys()


def test_a_file_cut_anywhere_is_named(tmp_path):
    path = small(tmp_path / "a.gguf")
    whole = path.read_bytes()
    # The padding behind the last tensor is nobody's loss.
    for size in [*range(0, 1200, 13), len(whole) // 2, len(whole) - 33]:
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="a.gguf"):
            read_gguf(path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda b: b"GGML" + b[4:], "no GGUF"),
        (lambda b: b[:4] + struct.pack(">I", 3) + b[8:], "big-endian"),
        (lambda b: b[:4] + struct.pack("<I", 1) + b[8:], "version 1"),
        (lambda b: b[:8] + struct.pack("<Q", 1 << 60) + b[16:], "announces"),
        (lambda b: b[:16] + struct.pack("<Q", 1 << 60) + b[24:], "announces"),
        (lambda b: b + bytes(64), "64 bytes follow the last tensor"),
        (lambda b: b.replace(b"some.counts", b"some.floats", 1), "occurs twice"),
        (lambda b: b.replace(struct.pack("<Q", 2) + b"t1", struct.pack("<Q", 2) + b"t0", 1), "'t0' occurs twice"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, change, said):
    path = small(tmp_path / "a.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=said) as error:
        read_gguf(path)
    assert str(path) in str(error.value)


def test_an_array_larger_than_its_file_is_not_believed(tmp_path):
    path = small(tmp_path / "a.gguf")
    whole = path.read_bytes()
    at = whole.index(b"some.strings") + len("some.strings") + 4
    for kind, count in ((8, 1 << 40), (8, 1 << 19), (0, 1 << 50), (12, 1 << 61), (9, 1), (99, 1)):
        path.write_bytes(whole[:at] + struct.pack("<IQ", kind, count) + whole[at + 12 :])
        with pytest.raises(CheckpointError, match="some.strings"):
            read_gguf(path)


def test_types_of_others_are_named(tmp_path):
    path = small(tmp_path / "a.gguf")
    whole = path.read_bytes()
    at = whole.index(b"blocks") + len("blocks") + 4 + 16
    assert whole[at : at + 4] == struct.pack("<I", 8)
    for kind, said in ((142, "prism-ml"), (31, "removed from ggml"), (77, "type 77")):
        path.write_bytes(whole[:at] + struct.pack("<I", kind) + whole[at + 4 :])
        with pytest.raises(CheckpointError, match=said):
            read_gguf(path)


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> bytes:
    return small(tmp_path_factory.mktemp("template") / "a.gguf").read_bytes()


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=examples(300), deadline=None)
def test_damaged_headers_are_refused_or_read_and_never_more(template, tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "fuzzed.gguf"
    made = bytearray(template)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 1100))
        if data.draw(st.booleans()):
            size = data.draw(st.sampled_from([4, 8]))
            large = st.sampled_from([0, 1, 255, 1 << 20, (1 << 31) - 1, (1 << 32) - 1])
            number = data.draw(large | st.integers(0, 1 << 31))
            made[at : at + size] = (number << (32 if size == 8 else 0)).to_bytes(8, "little")[:size]
        else:
            made[at] = data.draw(st.integers(0, 255))
    place.write_bytes(made)
    tracemalloc.start()
    try:
        read_gguf(place)
    except CheckpointError as error:
        assert "fuzzed.gguf" in str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 20_000_000
