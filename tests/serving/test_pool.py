"""When models are loaded and when they go, with models that take no memory; and once with the demo."""

import asyncio
import gc
import math
import threading
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import demo_folder
from mlx_qwen35.library.listing import LocalModel
from mlx_qwen35.serving import places, pool
from mlx_qwen35.serving.exchange import Ask
from mlx_qwen35.serving.loaded import Loading
from mlx_qwen35.serving.places import Place
from mlx_qwen35.serving.pool import Pool
from mlx_qwen35.serving.refusal import Refusal


class Pretended:
    """Models of 10 bytes each, in a memory of `room`; what happens is in `events`."""

    def __init__(self) -> None:
        self.room, self.seconds, self.events = 100, 0.0, []
        self.broken: set[str] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def load(self, folder: Path, how: Any, memory: Any, *, shares: bool, on_progress: Callable) -> SimpleNamespace:
        name = str(folder)
        with self.lock:
            self.at_once += 1
            self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            on_progress(1, 2)
            time.sleep(self.seconds)
            if name in self.broken:
                raise CheckpointError(f"{name} is damaged")
            self.events.append(f"+{name}")
            return SimpleNamespace(
                nbytes=10, reserved=10, since=time.time(), seconds=self.seconds, context_length=100,
                close=lambda: self.events.append(f"-{name}"), __str__=lambda self: "10 bytes",
            )  # fmt: skip
        finally:
            with self.lock:
                self.at_once -= 1

    def hold(self, folder: Path, memory: Any, **how: Any) -> None:
        if memory is not None and memory < 10:
            raise CheckpointError(f"{folder} does not fit into {memory} bytes: 10 are needed")


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> Pretended:
    made = Pretended()
    monkeypatch.setattr(pool, "Loaded", made.load)
    monkeypatch.setattr(pool, "hold", made.hold)
    monkeypatch.setattr(pool.Pool, "_left", lambda self, others: made.room - 10 * len(others))
    return made


def of(*names: str, **options: Any) -> Pool:
    def stored(name: str) -> LocalModel:
        return LocalModel(name, Path(name), "folder", None, 10, None, None, None, None, None, None, 100, (), None)

    return Pool([Place(name, Path(name), stored(name), asked=name) for name in names], **options)


def run(work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    return asyncio.run(asyncio.wait_for(work(), 20))


async def leased(models: Pool, name: str | None, ttl: float | None = None) -> Any:
    return await models.lease(await models.look_up(name), ttl)


async def settled(models: Pool) -> None:
    while models._background:
        await asyncio.gather(*models._background)


def test_many_wait_for_one_load(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a")
        pretended.seconds = 0.05
        leases = await asyncio.gather(*(leased(models, "a") for _ in range(5)))
        assert pretended.events == ["+a"] and all(0.04 < lease.load_seconds < 5 for lease in leases)
        assert (await leased(models, "a")).load_seconds == 0
        assert models.models()[0].busy == 6
        for lease in leases:
            lease.release()
            lease.release()  # once is enough
        assert models.models()[0].busy == 1
        await models.close()

    run(work)


def test_one_load_at_a_time_and_its_state(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b", "c")
        pretended.seconds = 0.05
        loading = [asyncio.ensure_future(leased(models, name)) for name in "abc"]
        await asyncio.sleep(0.02)
        assert models.models()[0].state == "loading" and models.places[0].share == 0.5
        await asyncio.gather(*loading)
        assert pretended.most_at_once == 1 and pretended.events == ["+a", "+b", "+c"]
        assert [each.state for each in models.models()] == ["loaded"] * 3
        await models.close()

    run(work)


def test_a_load_that_fails_is_told_and_tried_again(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b")
        pretended.broken = {"a"}
        results = await asyncio.gather(*(leased(models, "a") for _ in range(3)), return_exceptions=True)
        for error in results:
            assert isinstance(error, Refusal) and error.status == 503 and "a is damaged" in error.message
            assert isinstance(error.__cause__, CheckpointError)
        await leased(models, "b")
        pretended.broken = set()
        await leased(models, "a")
        assert models.models()[0].busy == 1
        await models.close()

    run(work)


def test_who_goes_away_while_it_loads(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a")
        pretended.seconds = 0.05
        first, second = (asyncio.ensure_future(leased(models, "a")) for _ in range(2))
        await asyncio.sleep(0.01)
        first.cancel()
        await second
        assert models.models()[0].busy == 1
        await models.close()

    run(work)


def test_idle_time(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b", ttl=0.05)
        lease = await leased(models, "a")
        await asyncio.sleep(0.1)  # in use it stays
        assert models.models()[0].loaded
        lease.release()
        await asyncio.sleep(0.03)
        (await leased(models, "a")).release()  # which begins the time anew
        await asyncio.sleep(0.03)
        assert models.models()[0].loaded
        await asyncio.sleep(0.08)
        assert pretended.events == ["+a", "-a"] and models.models()[0].state == "not-loaded"

        (await leased(models, "a", ttl=math.inf)).release()
        (await leased(models, "b", ttl=0)).release()
        await asyncio.sleep(0.1)
        assert pretended.events == ["+a", "-a", "+a", "+b", "-b"]
        (await leased(models, "a")).release()  # the server's own again
        await asyncio.sleep(0.1)
        assert pretended.events[-1] == "-a"
        await models.close()

    run(work)


def test_for_ever(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", ttl=0)
        (await leased(models, "a")).release()
        await asyncio.sleep(0.03)
        assert models.models()[0].loaded and models.models()[0].ttl == math.inf
        await models.close()

    run(work)


def test_the_least_recently_used_makes_room(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b", "c")
        pretended.room = 25
        for name in "aba":
            (await leased(models, name)).release()
            await asyncio.sleep(0.002)
        (await leased(models, "c")).release()
        assert pretended.events == ["+a", "+b", "-b", "+c"]
        await models.close()

    run(work)


def test_one_in_use_never_goes(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        models = of("a", "b")
        pretended.room = 15
        lease = await leased(models, "a")
        waiting = asyncio.ensure_future(leased(models, "b"))
        await asyncio.sleep(0.05)
        assert not waiting.done() and pretended.events == ["+a"]
        lease.release()
        (await waiting).release()
        assert pretended.events == ["+a", "-a", "+b"]

        lease = await leased(models, "b")
        monkeypatch.setattr(pool, "PATIENCE", 0.05)
        with pytest.raises(Refusal, match="10 are needed.* In use is b") as told:
            await leased(models, "a")
        assert told.value.status == 503 and told.value.retry_after
        assert models.models()[1].loaded
        await models.close()

    run(work)


def test_one_that_never_fits(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b")
        pretended.room = 5
        with pytest.raises(Refusal, match="does not fit into 5 bytes") as told:
            await leased(models, "a")
        assert told.value.status == 503
        await models.close()

    run(work)


def test_names(pretended: Pretended) -> None:
    async def work() -> None:
        one, two = of("Qwen/Qwen3.5-4B"), of("Qwen/Qwen3.5-4B", "Qwen/Qwen3.5-9B")
        for name in (None, "", "gpt-9", "claude-opus-5-5", "Qwen/Qwen3.5-4B"):
            assert (await one.look_up(name)).name == "Qwen/Qwen3.5-4B"
        for name in ("qwen/qwen3.5-9b", "Qwen3.5-9B", "qwen3.5-9b:latest", "Qwen/Qwen3.5-9B"):
            assert (await two.look_up(name)).name == "Qwen/Qwen3.5-9B"
        with pytest.raises(Refusal, match="Qwen/Qwen3.5-4B, Qwen/Qwen3.5-9B") as told:
            await two.look_up("gpt-9")
        assert told.value.status == 404
        assert (await two.look_up(None)).name == "Qwen/Qwen3.5-4B"
        with pytest.raises(Refusal):
            await two.look_up_answerer("gpt-9")
        await leased(two, "Qwen3.5-9B")
        assert (await two.look_up(None)).name == (await two.look_up_answerer("gpt-9")).name == "Qwen/Qwen3.5-9B"
        with pytest.raises(Refusal):  # to load or unload it takes its name
            await two.look_up("gpt-9")
        await leased(two, "Qwen3.5-4B")
        with pytest.raises(Refusal):
            await two.look_up_answerer("gpt-9")
        await one.close()
        await two.close()

    run(work)


def test_unloading_waits_for_what_is_answered(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b")
        lease = await leased(models, "a")
        going = asyncio.ensure_future(models.unload("a"))
        await asyncio.sleep(0.02)
        assert not going.done()
        lease.release()
        await going
        await models.unload("b")  # which is not loaded
        assert pretended.events == ["+a", "-a"]
        with pytest.raises(Refusal):
            await models.unload("c")
        await models.close()

    run(work)


def test_load_by_hand(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a")
        assert (await models.load("a", ttl=7)).ttl == 7
        assert (await models.load("a")).ttl == 3600
        assert (await models.load("a", context_length=50)).loaded
        assert pretended.events == ["+a", "-a", "+a"] and models.places[0].busy == 0
        await models.close()

    run(work)


def test_closing(pretended: Pretended) -> None:
    async def work() -> None:
        models = of("a", "b")
        await leased(models, "a")
        pretended.seconds = 0.1
        loading = asyncio.ensure_future(leased(models, "b"))
        await asyncio.sleep(0.02)
        await models.close()
        await models.close()
        with pytest.raises((Refusal, asyncio.CancelledError)):
            await loading
        with pytest.raises(Refusal) as told:
            await leased(models, "a")
        assert told.value.status == 503
        assert "-a" in pretended.events

    run(work)


def test_models_of_this_machine_are_looked_for_again(pretended: Pretended, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        models = of("a", named=False)
        monkeypatch.setattr(pool, "LOOK_AGAIN", 0.0)
        monkeypatch.setattr(places, "on_this_machine", lambda known: [*known, *of("b").places])
        first = models.places[0]
        assert (await models.look_up("b")).name == "b" and models.places[0] is first
        with pytest.raises(Refusal, match="not on this machine"):
            await models.look_up("Qwen/Qwen3.5-4B")  # which is on the Hub, and stays there
        await models.close()

    run(work)


def test_the_demo_comes_and_goes() -> None:
    """Its memory is given back, and prompts are counted without it."""

    async def work() -> None:
        gc.collect()
        before = mx.get_active_memory()
        models = Pool(places.named(["demo"]), Loading(parallel=2))
        ask = Ask(None, [{"role": "user", "content": "What is 17 + 25?"}])
        count = await models.count(ask)
        assert count > 10 and not models.models()[0].loaded
        lease = await leased(models, "demo")
        assert await models.count(ask) == count == lease.loaded.submit(ask).prompt_tokens
        shown = models.models()[0]
        assert shown.nbytes > 10**7 and mx.get_active_memory() - before >= shown.nbytes and shown.parallel == 2
        lease.release()
        del lease
        await models.unload("demo")
        gc.collect()
        assert mx.get_active_memory() - before < 10**6
        await models.close()

    run(work)


def test_a_folder_is_called_by_its_own_name(tmp_path: Path) -> None:
    there = tmp_path / "My-Qwen"
    there.symlink_to(demo_folder())
    (place,) = places.named([str(there)])
    assert place.asked == str(there) and place.name == "My-Qwen"
    (place,) = places.named([there])
    assert place.name == "My-Qwen"
