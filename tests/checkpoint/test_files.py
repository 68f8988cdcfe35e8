"""Headers, shards and index: what is whole is read exactly, what is damaged is refused before any data is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import INDEX, open_folder, read, read_columns, read_header, read_stacked
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import write_safetensors

A = np.arange(24, dtype=np.float32).reshape(2, 6, 2)
B = np.arange(5, dtype=np.float32)


def write_raw(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(dtype: str, shape: list[int], *offsets: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": A, "b": B}, {"a": "float32", "b": "bfloat16"}, {"format": "pt"})
    return path


def test_reads_what_was_written(file: Path) -> None:
    entries, metadata = read_header(file)
    assert metadata == {"format": "pt"}
    assert (entries["a"].dtype, entries["a"].shape, entries["b"].nbytes) == ("F32", (2, 6, 2), 10)
    assert np.array_equal(read(entries["a"]), A)
    assert np.array_equal(read(entries["b"]).astype(np.uint32) << 16, B.view(np.uint32))


def test_metadata_of_null(tmp_path: Path) -> None:
    """As mx.save_safetensors writes it where it is given none; [] and false stay damaged."""
    path = tmp_path / "model.safetensors"
    mx.save_safetensors(str(path), {"a": mx.array(A)})
    assert b'"__metadata__":null' in path.read_bytes()
    entries, metadata = read_header(path)
    assert metadata == {} and np.array_equal(read(entries["a"]), A)
    for damaged in ([], False, 0, ""):
        write_raw(path, {"__metadata__": damaged, "a": entry("U8", [4], 0, 4)}, b"\0" * 4)
        with pytest.raises(CheckpointError, match="__metadata__ is damaged"):
            read_header(path)


def test_reads_rows_and_halves(file: Path) -> None:
    a = read_header(file)[0]["a"]
    assert np.array_equal(read(a, 1, 2), A[1:])
    assert np.array_equal(read(a, half=0), A[:, :3])
    assert np.array_equal(read(a, 1, 2, half=1), A[1:, 3:])


def test_reads_columns(tmp_path: Path) -> None:
    """Of a matrix behind another tensor, in more bytes than one a number."""
    matrix = np.random.RandomState(2).standard_normal((5, 7)).astype(np.float32)
    path = tmp_path / "model.safetensors"
    write_safetensors(path, {"a": A, "c": matrix}, {"a": "float32", "c": "float32"}, {})
    c = read_header(path)[0]["c"]
    for start, stop in ((0, 7), (0, 1), (2, 5), (6, 7)):
        assert np.array_equal(read_columns(c, start, stop), matrix[:, start:stop])


def test_stacks(file: Path) -> None:
    b = read_header(file)[0]["b"]
    assert read_stacked([b, b, b]).shape == (3, 5)
    assert np.array_equal(read_stacked([b, b])[1], read(b))


def test_scalars_and_empty_tensors(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"s": entry("F32", [], 0, 4), "e": entry("F32", [0, 3], 0, 0)}, b"\0" * 4)
    entries, _ = read_header(tmp_path / "model.safetensors")
    assert read(entries["s"]) == 0 and read(entries["e"]).shape == (0, 3)


DAMAGES: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda raw: b"", "has 0 bytes"),
    "five bytes": (lambda raw: raw[:5], "has 5 bytes"),
    "cut in the header": (lambda raw: raw[:60], "announce a header"),
    "cut in the data": (lambda raw: raw[:-4], "ends early.*first tensor cut off is b"),
    "cut before the data": (lambda raw: raw[: -len(B) * 2 - A.nbytes], "first tensor cut off is a"),
    "bytes after the end": (lambda raw: raw + b"\0", "1 bytes after its last tensor b"),
    "a pointer": (lambda raw: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "git lfs pull"),
    "a web page": (lambda raw: b"<!DOCTYPE html><html>rate limited</html>", "no safetensors file"),
    "a pickle": (lambda raw: b"PK\3\4" + b"\0" * 100, "header"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file(file: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(file.parent)
    assert str(file) in str(caught.value)


HEADERS = {
    "not JSON": (b"{nonsense}", "damaged"),
    "not UTF-8": (b'{"\xff": 1}', "damaged"),
    "a list": ([], "no JSON object"),
    "nested without end": (b"[" * 100_000, "damaged"),
    "a name twice": (
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        "'a' occurs twice",
    ),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, "__metadata__"),
    "an entry of text": ({"a": "F32"}, "entry for 'a'"),
    "an entry too many": ({"a": {**entry("F32", [1], 0, 4), "x": 1}}, "entry for 'a'"),
    "unknown dtype": ({"a": entry("F31", [1], 0, 4)}, "a has the dtype 'F31'"),
    "dtype of a list": ({"a": entry(["F32"], [1], 0, 4)}, "a has the dtype"),
    "negative shape": ({"a": entry("F32", [-1, -1], 0, 4)}, "where counts are expected"),
    "true as a size": ({"a": entry("F32", [True], 0, 4)}, "where counts are expected"),
    "endless size": ({"a": entry("F32", [10**30], 0, 4)}, "where counts are expected"),
    "three offsets": ({"a": entry("F32", [1], 0, 4, 8)}, "where counts are expected"),
    "backwards": ({"a": entry("F32", [1], 4, 0)}, "takes 4 bytes.*gives it -4"),
    "wrong size": ({"a": entry("F32", [2], 0, 4)}, "takes 8 bytes.*gives it 4"),
    "overlap": ({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}, "data of b overlaps a"),
    "hole": ({"a": entry("U8", [1], 0, 1), "b": entry("U8", [2], 2, 4)}, "data of b leaves a hole after a"),
    "hole at the start": ({"b": entry("U8", [2], 2, 4)}, "leaves a hole after the header"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_damaged_header(tmp_path: Path, case: str) -> None:
    header, message = HEADERS[case]
    write_raw(tmp_path / "model.safetensors", header, b"\0" * 4)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(tmp_path)
    assert "model.safetensors" in str(caught.value)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    weight_map = {}
    for number, name in enumerate("ab", 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        write_safetensors(tmp_path / file, {name: B}, {name: "float32"}, {"format": "pt"})
        weight_map[name] = file
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {"total_size": 40}, "weight_map": weight_map}))
    return tmp_path


def test_shards(shards: Path) -> None:
    assert set(open_folder(shards).entries) == {"a", "b"}
    (shards / INDEX).unlink()
    assert set(open_folder(shards).entries) == {"a", "b"}


def test_files_beside_the_index_are_not_read(shards: Path) -> None:
    (shards / "model-old.safetensors").write_bytes(b"")
    assert set(open_folder(shards).entries) == {"a", "b"}


@pytest.mark.parametrize("with_index", [True, False])
def test_missing_shard(shards: Path, with_index: bool) -> None:
    (shards / "model-00002-of-00002.safetensors").unlink()
    if not with_index:
        (shards / INDEX).unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors.*finish the download"):
        open_folder(shards)


def test_tensor_in_two_shards(shards: Path) -> None:
    write_safetensors(
        shards / "model-00002-of-00002.safetensors", {"a": B, "b": B}, {"a": "float32", "b": "float32"}, {}
    )
    with pytest.raises(CheckpointError, match="a is in two files"):
        open_folder(shards)


INDEXES = {
    "cut": ('{"weight_map": {"a"', "damaged"),
    "no map": ("{}", "no weight_map"),
    "an empty map": ('{"weight_map": {}}', "no weight_map"),
    "a map of lists": ('{"weight_map": {"a": []}}', "no name of a shard"),
    "out of the folder": ('{"weight_map": {"a": "../model.safetensors"}}', "no name of a shard"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    "a tensor too many": (
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors",'
        ' "c": "model-00002-of-00002.safetensors"}}',
        "not where it says .c;",
    ),
    "a tensor elsewhere": (
        '{"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}}',
        "2 tensors that are not where it says",
    ),
    "a tensor left out": ('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}', None),
    "only part of a shard": (
        '{"weight_map": {"a": "model-00001-of-00002.safetensors", "x": "model-00002-of-00002.safetensors"}}',
        "not where it says .x;",
    ),
}


@pytest.mark.parametrize("case", INDEXES)
def test_index_that_lies(shards: Path, case: str) -> None:
    text, message = INDEXES[case]
    (shards / INDEX).write_text(text)
    if message is None:  # a whole shard that is not named is none of this checkpoint's
        assert set(open_folder(shards).entries) == {"a"}
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        open_folder(shards)
    assert INDEX in str(caught.value)


def test_index_that_leaves_a_tensor_out(shards: Path) -> None:
    file = "model-00002-of-00002.safetensors"
    write_safetensors(shards / file, {"b": B, "c": B}, {"b": "float32", "c": "float32"}, {})
    with pytest.raises(CheckpointError, match=f"leaves out 1 tensors of its shards .c, in {file}"):
        open_folder(shards)


def test_folder_without_weights(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no model.*safetensors: finish the download"):
        open_folder(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match="pytorch_model.bin is not read"):
        open_folder(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be listed"):
        open_folder(tmp_path / "nowhere")


def test_file_that_shrinks_while_it_is_read(file: Path) -> None:
    b = read_header(file)[0]["b"]
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match="ends within b"):
        read(b)
    file.unlink()
    with pytest.raises(CheckpointError, match="b in model.safetensors cannot be read"):
        read(b)


def test_dtypes_that_are_not_read(tmp_path: Path) -> None:
    write_raw(tmp_path / "model.safetensors", {"a": entry("F64", [1], 0, 8)}, b"\0" * 8)
    with pytest.raises(CheckpointError, match="dtype F64"):
        read(open_folder(tmp_path).entries["a"])
