"""MLX's GPU asked by name, and limits that several share: what was there before is there again afterwards."""

import gc
import os
from collections.abc import Iterator

import mlx.core as mx
import pytest

from mlx_qwen35 import Sampling, Session, generate, generate_batch, load, stream_generate
from mlx_qwen35.library import demo_folder, load_model
from mlx_qwen35.machine import gpu
from tests.mac.pretended import GPU

BEFORE = 1 << 40  # MLX's own limit is about as much as there is
MOST = GPU["max_recommended_working_set_size"]


class Limits:
    """What MLX's limits are, and every change of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, metal: bool):
        self.now = {"set_cache_limit": BEFORE, "set_wired_limit": 0}
        self.changes: list[tuple[str, int]] = []
        for name in self.now:
            monkeypatch.setattr(mx, name, self._setter(name))
        for name in ("_CACHE", "_WIRED"):  # whatever other tests still hold
            held = getattr(gpu, name)
            monkeypatch.setattr(gpu, name, gpu._Limit(held._setter, held._choose))
        monkeypatch.setattr(mx.metal, "is_available", lambda: metal)
        monkeypatch.setattr(mx, "device_info", lambda device=mx.cpu: GPU if metal and device == mx.gpu else {})

    def _setter(self, name: str):
        def change(limit: int) -> int:
            if name == "set_wired_limit" and limit > MOST:
                raise ValueError("[metal::set_wired_limit] more than the recommended working set")
            before, self.now[name] = self.now[name], limit
            self.changes.append((name, limit))
            return before

        return change

    @property
    def cache(self) -> int:
        return self.now["set_cache_limit"]

    @property
    def wired(self) -> int:
        return self.now["set_wired_limit"]


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Limits:
    """Metal, with the CPU as default device."""
    return Limits(monkeypatch, metal=True)


@pytest.fixture
def no_metal(monkeypatch: pytest.MonkeyPatch) -> Limits:
    return Limits(monkeypatch, metal=False)


def test_the_gpu_is_asked_by_name(mac: Limits) -> None:
    assert mx.default_device() == mx.cpu and not mx.device_info()
    assert gpu.working_set() == MOST and gpu.gpu_memory() == GPU["memory_size"]


def test_nothing_is_made_up(monkeypatch: pytest.MonkeyPatch, no_metal: Limits) -> None:
    assert gpu.working_set() is None and gpu.gpu_memory() is None and gpu.gpu_info() == {}
    monkeypatch.setattr(mx.metal, "is_available", lambda: True)
    assert gpu.working_set() is None  # Metal that does not say
    monkeypatch.setattr(mx.metal, "is_available", lambda: False)
    monkeypatch.setattr(mx, "device_info", lambda device: GPU)
    assert gpu.working_set() is None and gpu.gpu_memory() == GPU["memory_size"]

    def broken(device: object = None) -> dict:
        raise RuntimeError("[device_info] no such device")

    monkeypatch.setattr(mx, "device_info", broken)
    assert gpu.working_set() is None and gpu.gpu_info() == {}
    monkeypatch.setattr(mx, "device_info", lambda device: {"total_memory": 7})
    assert gpu.gpu_memory() == 7  # CUDA's word


def test_the_last_to_let_go_puts_back_what_was_there(mac: Limits) -> None:
    first, second = gpu.limit_cache(50), gpu.limit_cache(70)
    assert mac.cache == 50
    first()
    assert mac.cache == 70
    first()  # a second call does nothing
    assert mac.cache == 70
    second()
    assert mac.cache == BEFORE
    one, all_of_it, too_much = gpu.keep_wired(30), gpu.keep_wired(), gpu.keep_wired(2 * MOST)
    assert mac.wired == MOST
    all_of_it(), too_much()
    assert mac.wired == 30
    one()
    assert mac.wired == 0


def test_a_forked_child_leaves_the_limits_alone(mac: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """It collects what its parent had, and a lock of MLX's that another thread held then is held there for ever."""
    let_go = gpu.limit_cache(50)
    pid = os.getpid()
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: pid + 1)
        let_go()
    assert mac.cache == 50
    let_go()
    assert mac.cache == BEFORE


def test_what_mlx_refuses_is_not_asked(mac: Limits, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the limit of the system was lowered meanwhile: there is an answer, and the next may ask again."""
    one = gpu.keep_wired(30)
    monkeypatch.setattr(gpu, "working_set", lambda: 2 * MOST)
    two = gpu.keep_wired()
    assert mac.wired == 30
    two()
    assert mac.wired == 30
    one()
    assert mac.wired == 0
    with gpu.wired():
        assert mac.wired == 0


def test_without_metal_nothing_is_wired(no_metal: Limits) -> None:
    gpu.keep_wired()(), gpu.keep_wired(7)()
    with gpu.wired():
        pass
    assert not no_metal.changes


def test_an_error_lets_go(mac: Limits) -> None:
    with pytest.raises(KeyError), gpu.wired():
        assert mac.wired == MOST
        raise KeyError
    assert mac.wired == 0


def test_streamed_experts(mac: Limits) -> None:
    """MLX keeps few spare buffers and the plan's memory in place, as long as the model lives; then it is as before."""
    size = 150_000_000
    model = load_model(demo_folder(), memory=size, context_length=512, warm_start=False)
    assert model.expert_stats is not None
    assert 0 < mac.cache < size and mac.wired == size
    model.unload()
    assert (mac.cache, mac.wired) == (BEFORE, 0)


def test_streamed_experts_that_are_forgotten(mac: Limits) -> None:
    model = load_model(demo_folder(), memory=150_000_000, context_length=512, warm_start=False)
    assert mac.wired == 150_000_000
    del model
    gc.collect()
    assert (mac.cache, mac.wired) == (BEFORE, 0)


def test_streamed_experts_without_metal(no_metal: Limits) -> None:
    model = load_model(demo_folder(), memory=150_000_000, context_length=512, warm_start=False)
    assert no_metal.cache < 150_000_000
    model.unload()
    assert no_metal.cache == BEFORE and all(name == "set_cache_limit" for name, _ in no_metal.changes)


@pytest.fixture(scope="module")
def loaded() -> tuple:
    return load()


class TestResidentModels:
    """A model that is all in memory is kept in place while it answers, as mlx-lm does."""

    def parts(self, loaded: tuple, **more: object) -> Iterator:
        return stream_generate(*loaded, "Sort: dog, cat, ant", max_tokens=4, sampling=Sampling(temperature=0), **more)

    def test_while_it_answers(self, loaded: tuple, mac: Limits) -> None:
        parts = self.parts(loaded)
        assert mac.wired == 0  # nothing was asked for yet
        for _ in parts:
            assert mac.wired == MOST
        assert mac.wired == 0

    def test_in_a_session(self, loaded: tuple, mac: Limits) -> None:
        for _ in self.parts(loaded, session=Session(loaded[0])):
            assert mac.wired == MOST
        assert mac.wired == 0

    @pytest.mark.parametrize("how", ["closed", "forgotten", "error"])
    def test_however_it_ends(self, loaded: tuple, mac: Limits, how: str) -> None:
        parts = self.parts(loaded)
        next(parts)
        assert mac.wired == MOST
        if how == "closed":
            parts.close()
        elif how == "error":
            with pytest.raises(KeyError):
                parts.throw(KeyError())
        del parts
        gc.collect()
        assert mac.wired == 0

    def test_two_at_once(self, loaded: tuple, mac: Limits) -> None:
        first, second = self.parts(loaded), self.parts(loaded)
        next(first), next(second)
        first.close()
        assert mac.wired == MOST
        list(second)
        assert mac.wired == 0

    def test_whole_answers_and_batches(self, loaded: tuple, mac: Limits) -> None:
        generate(*loaded, "Sort: b, a", max_tokens=2)
        assert mac.changes == [("set_wired_limit", MOST), ("set_wired_limit", 0)]
        generate_batch(*loaded, ["Sort: b, a", "Sort: d, c"], max_tokens=2)
        assert mac.changes == [("set_wired_limit", MOST), ("set_wired_limit", 0)] * 2

    def test_streamed_ones_keep_their_plan(self, mac: Limits) -> None:
        model, processor = load(memory=150_000_000, context_length=512, warm_start=False)
        assert model.expert_stats is not None
        generate(model, processor, "Sort: b, a", max_tokens=2)
        assert [limit for name, limit in mac.changes if name == "set_wired_limit"] == [150_000_000]
        model.unload()
        assert mac.wired == 0
