"""Damaged files: a CheckpointError or the very same model, never another error, a crash or a wrong model.

Only what can be noticed is damaged: config.json, headers and the index. Flipped bits of weights are weights.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint.files import INDEX
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.soak import examples

ROUNDS = examples(250, 2)
SHARD = "model-00001-of-00002.safetensors"
TOKENS = mx.array([[1, 2, 3]])


@pytest.fixture(scope="module", params=["hf", "mlx"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    kinds = ["linear_attention", "full_attention"]
    config = tiny_config("moe", layer_types=kinds, vision=True, mtp_num_hidden_layers=1, num_experts=4)
    folder = tmp_path_factory.mktemp("fuzz") / "whole"
    return write_checkpoint(folder, config, random_tensors(config, 5), shards=2, layout=request.param)


def flip(raw: bytes, end: int, rng: np.random.RandomState) -> bytes:
    """One to three bits before `end`."""
    damaged = bytearray(raw)
    for place in rng.randint(0, end * 8, rng.randint(1, 4)):
        damaged[place // 8] ^= 1 << place % 8
    return bytes(damaged)


def cut(raw: bytes, end: int, rng: np.random.RandomState) -> bytes:
    """The beginning."""
    return raw[: rng.randint(0, end)]


def drop(raw: bytes, end: int, rng: np.random.RandomState) -> bytes:
    """All but a few bytes before `end`."""
    start = rng.randint(0, end)
    return raw[:start] + raw[start + rng.randint(1, 9) :]


def digit(raw: bytes, end: int, rng: np.random.RandomState) -> bytes:
    """Another digit for one: still valid JSON, so that what it says has to be checked."""
    places = [n for n in range(8, end) if 48 <= raw[n] <= 57]
    damaged = bytearray(raw)
    damaged[places[rng.randint(len(places))]] = 48 + rng.randint(10)
    return bytes(damaged)


def damages(path: Path, end: int) -> Iterator[tuple[str, bytes]]:
    raw = path.read_bytes()
    ways: list[Callable[[bytes, int, np.random.RandomState], bytes]] = [flip, cut, drop, digit]
    for seed in range(ROUNDS):
        rng = np.random.RandomState(seed)
        way = ways[seed % len(ways)]
        damaged = way(raw, end, rng)
        if damaged != raw:
            yield f"{way.__name__} {seed}", damaged


def check(whole: Path, folder: Path, file: str, end: int | None = None) -> None:
    expected = dict(tree_flatten(load_model(whole).parameters()))
    shutil.copytree(whole, folder)
    refused = 0
    for what, damaged in damages(whole / file, end or (whole / file).stat().st_size):
        (folder / file).write_bytes(damaged)
        try:
            model = load_model(folder)
        except CheckpointError as error:
            assert str(folder) in str(error), what
            refused += 1
            continue
        found = dict(tree_flatten(model.parameters()))
        assert found.keys() == expected.keys(), what
        assert all(mx.array_equal(found[name], expected[name]) for name in expected), what
        assert model(TOKENS).shape == (1, 3, 96), what
    assert refused > ROUNDS / 3  # the rest hit blanks, or values that no file contradicts


def test_damaged_config(whole: Path, tmp_path: Path) -> None:
    check(whole, tmp_path / "a", "config.json")


def test_damaged_header(whole: Path, tmp_path: Path) -> None:
    with open(whole / SHARD, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
    check(whole, tmp_path / "a", SHARD, 8 + length)


def test_damaged_index(whole: Path, tmp_path: Path) -> None:
    check(whole, tmp_path / "a", INDEX)


def test_cut_at_every_kind_of_place(whole: Path, tmp_path: Path) -> None:
    raw = (whole / SHARD).read_bytes()
    shutil.copytree(whole, tmp_path / "a")
    for size in [0, 1, 7, 8, 9, 100, len(raw) // 2, len(raw) - 1]:
        (tmp_path / "a" / SHARD).write_bytes(raw[:size])
        with pytest.raises(CheckpointError, match=SHARD):
            load_model(tmp_path / "a")
