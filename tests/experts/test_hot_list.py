"""What was in memory at the end is read again at the start: the file, and that nothing but time depends on it."""

import json
import os
import threading
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.expert_files import expert_layouts, fingerprint
from mlx_qwen35.checkpoint.load import load_model, read_config
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import ExpertReadError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.experts.handles import Handle
from mlx_qwen35.experts.hot_list import MOST_BYTES, MOST_FILES, HotList
from mlx_qwen35.experts.streamed import StreamedExperts
from mlx_qwen35.generation import prefill
from mlx_qwen35.library import Held, load_held

from ..checkpoints import random_tensors, tiny_config, write_checkpoint

LAYERS, EXPERTS, SLOTS = 4, 40, 20
PLAN = StreamPlan(slots=(SLOTS,) * LAYERS, group=4, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
SIZES = {"num_experts": EXPERTS, "num_experts_per_tok": 3, "num_hidden_layers": LAYERS}
KNOWN = {0: EXPERTS, 1: EXPERTS}
TOKENS = [5, 17, 44, 9, 71]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("hot")
    config = tiny_config("moe", **SIZES)
    write_checkpoint(made, config, random_tensors(config), layout="mlx")
    return made


def step_by_step(model) -> np.ndarray:
    cache = model.make_cache()
    return np.concatenate([np.array(model(mx.array([[token]]), cache)[0]) for token in TOKENS])


def warmed(model) -> list[list[int]]:
    """What is in memory of each layer, when the warm start has ended."""
    if model._pool._warmer is not None:
        model._pool._warmer.join(60)
    return [sorted(bank.residency.slot_of) for bank in model._pool.banks]


class TestFile:
    def test_it_comes_back(self, tmp_path):
        hot = HotList(tmp_path / "a" / "b", "f00")
        assert hot.read(KNOWN) == {}
        hot.write({0: [3, 1, 2], 1: []})
        assert hot.read(KNOWN) == {0: [3, 1, 2], 1: []}
        hot.write({1: [7]})
        assert hot.read(KNOWN) == {1: [7]} and len(list(hot.path.parent.iterdir())) == 1

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda told: told["layers"].update({"0": [1, 1]}),
            lambda told: told["layers"].update({"0": [EXPERTS]}),
            lambda told: told["layers"].update({"0": [-1]}),
            lambda told: told["layers"].update({"0": [True]}),
            lambda told: told["layers"].update({"0": "12"}),
            lambda told: told["layers"].update({"5": [1]}),
            lambda told: told["layers"].update({"x": [1]}),
            lambda told: told.update(layers=[1]),
            lambda told: told.update(layers=None),
            lambda told: told.update(version=2),
            lambda told: told.update(checkpoint="other"),
            lambda told: told.pop("format"),
        ],
    )
    def test_what_is_damaged_or_foreign_says_nothing(self, tmp_path, spoil):
        hot = HotList(tmp_path, "f00")
        hot.write({0: [1, 2], 1: [3]})
        told = json.loads(hot.path.read_text())
        spoil(told)
        hot.path.write_text(json.dumps(told))
        assert hot.read(KNOWN) == {}

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"7", b"\xff\xfe", b"[" * 100_000])
    def test_what_is_no_list_says_nothing(self, tmp_path, content):
        hot = HotList(tmp_path, "f00")
        hot.path.write_bytes(content)
        assert hot.read(KNOWN) == {}

    def test_its_size_is_bounded(self, tmp_path):
        hot = HotList(tmp_path, "f00")
        hot.write({0: [1]})
        hot.write({layer: list(range(512)) for layer in range(600)})
        assert hot.read(KNOWN) == {0: [1]} and os.path.getsize(hot.path) < MOST_BYTES
        hot.path.write_text(hot.path.read_text() + " " * MOST_BYTES)
        assert hot.read(KNOWN) == {0: [1]}  # a beginning that is whole is not refused, and no more than that is read

    def test_old_ones_are_forgotten(self, tmp_path):
        for number in range(MOST_FILES + 5):
            path = HotList(tmp_path, f"{number}").path
            path.write_text("{}")
            os.utime(path, (number, number))
        HotList(tmp_path, "new").write({0: [1]})
        left = {path.stem for path in tmp_path.iterdir()}
        assert len(left) == MOST_FILES and {"new", f"{MOST_FILES + 4}"} <= left and "0" not in left

    def test_where_nothing_can_be_written_nothing_is(self, tmp_path):
        (tmp_path / "file").write_text("")
        hot = HotList(tmp_path / "file", "f00")
        hot.write({0: [1]})
        assert hot.read(KNOWN) == {}


class TestWarmStart:
    def test_what_was_in_memory_is_there_again(self, folder, tmp_path):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        assert warmed(model) == [[]] * LAYERS
        expected = step_by_step(model)
        before = [sorted(bank.residency.hot()) for bank in model._pool.banks]
        model.unload()
        assert len(list(tmp_path.iterdir())) == 1
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        assert warmed(model) == before
        stats = model.expert_stats
        assert stats.warmed == stats.records == sum(map(len, before)) > 3 * LAYERS
        model._pool.prefetch = False
        np.testing.assert_array_equal(step_by_step(model), expected)
        assert (model.expert_stats - stats).misses == 0
        model.unload()

    def test_the_most_valuable_are_the_last_to_go(self, folder, tmp_path):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        prefill(model, list(range(60)), model.make_cache())
        hot = [bank.residency.hot() for bank in model._pool.banks]
        model.unload()
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        warmed(model)
        assert [bank.residency.hot() for bank in model._pool.banks] == hot
        model.unload()

    def test_a_smaller_plan_takes_the_most_valuable(self, folder, tmp_path):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        prefill(model, list(range(60)), model.make_cache())
        hot = [bank.residency.hot() for bank in model._pool.banks]
        model.unload()
        small = StreamPlan(**vars(PLAN) | {"slots": (5,) * LAYERS})
        model = load_model(folder, stream=small, hot_lists=tmp_path)
        assert warmed(model) == [sorted(experts[:5]) for experts in hot]
        model.unload()

    def test_who_asks_does_not_wait_for_it(self, folder, tmp_path, monkeypatch):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        expected = step_by_step(model)
        model.unload()
        began, go_on, warm = threading.Event(), threading.Event(), StreamedExperts.warm

        def slow(self, experts):
            began.set()
            assert go_on.wait(60)
            return warm(self, experts)

        monkeypatch.setattr(StreamedExperts, "warm", slow)
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        assert began.wait(60)
        threading.Timer(1.0, go_on.set).start()  # long after the first token was asked for
        np.testing.assert_array_equal(step_by_step(model), expected)
        model._pool._warmer.join(60)
        assert 0 < model.expert_stats.warmed <= 16  # what was under way, and no more
        model.unload()
        (path,) = tmp_path.iterdir()
        assert len(HotList(tmp_path, path.stem).read(dict.fromkeys(range(LAYERS), EXPERTS))) == LAYERS

    def test_a_disk_that_fails_is_no_error_yet(self, folder, tmp_path, monkeypatch):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        expected = step_by_step(model)
        model.unload()
        with monkeypatch.context() as broken:
            broken.setattr(Handle, "read", lambda *_: (_ for _ in ()).throw(ExpertReadError("no disk")))
            model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
            assert warmed(model) == [[]] * LAYERS
        np.testing.assert_array_equal(step_by_step(model), expected)
        model.unload()

    def test_what_was_never_asked_leaves_the_list_alone(self, folder, tmp_path):
        model = load_model(folder, stream=PLAN, hot_lists=tmp_path)
        step_by_step(model)
        model.unload()
        (path,) = tmp_path.iterdir()
        text = path.read_text()
        load_model(folder, stream=PLAN, hot_lists=tmp_path).unload()
        assert path.read_text() == text

    def test_without_one(self, folder, tmp_path, monkeypatch):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        held = Held(folder, None, None, PLAN)
        for warm_start in (False, True):
            model = load_held(held, warm_start=warm_start)
            step_by_step(model)
            model.unload()
            assert len(list(tmp_path.rglob("*.json"))) == warm_start


def test_fingerprints_tell_checkpoints_apart(folder, tmp_path):
    config = tiny_config("moe", **SIZES)
    write_checkpoint(tmp_path / "other", config, random_tensors(config, seed=1), layout="mlx")
    convert(folder, tmp_path / "packed", bits=None, pack_experts=True)
    found = {}
    for name, place in {"one": folder, "other": tmp_path / "other", "packed": tmp_path / "packed"}.items():
        found[name] = fingerprint(expert_layouts(open_source(place, read_config(place))))
    assert found["one"] == found["packed"] != found["other"]
