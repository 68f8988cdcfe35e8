"""The models of a server: which one a name means, when one is loaded, and when it has to go.

Knows places, leases, idle time and bytes: one load at a time, the least recently used idle model goes to make room, one
in use never does. Knows neither HTTP nor how a model answers. All of it runs on the server's event loop, but what takes
time, which has threads.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, TypeVar

from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.library.holding import hold
from mlx_qwen35.library.loading import load_processor
from mlx_qwen35.library.memory import memory_left, memory_size
from mlx_qwen35.library.plan import shown_size
from mlx_qwen35.serving import loaded as in_memory
from mlx_qwen35.serving import places
from mlx_qwen35.serving.catalogue import Listed, found, not_found
from mlx_qwen35.serving.exchange import Ask
from mlx_qwen35.serving.loaded import Loaded, Loading
from mlx_qwen35.serving.places import Place
from mlx_qwen35.serving.refusal import Refusal

log = logging.getLogger("mlx_qwen35.serving")

PATIENCE = 60.0  # seconds that a model may wait until others, which are in use, make room for it
LOOK_AGAIN = 5.0  # seconds after which the disk is looked at again for a name that there was not
_T = TypeVar("_T")


class Lease:
    """A model that is in use until `release`. load_seconds: that this lease waited for it to be loaded."""

    def __init__(self, pool: Pool, place: Place, loaded: Loaded, load_seconds: float) -> None:
        self.place, self.loaded, self.load_seconds = place, loaded, load_seconds
        self._pool: Pool | None = pool

    def release(self) -> None:
        """Once or more."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool._released(self.place)


class Pool:
    """A Catalogue that gives models out. how: as models are loaded; ttl: idle seconds that one stays, 0: for ever.

    models: places that may be loaded; named: they are all that there are, and if it is one alone, it answers to every
    name. Not named: they are what lies on this machine, looked at again for a name that is not among them.
    closing: nothing new is begun.
    """

    def __init__(
        self, models: Sequence[Place], how: Loading | None = None, *, ttl: float = 3600, named: bool = True
    ) -> None:
        self.how, self.ttl = how or Loading(), ttl or math.inf
        self.places, self._named = list(models), named
        self._looked = time.monotonic()
        self._one_at_a_time = asyncio.Lock()
        self._threads = ThreadPoolExecutor(8, "mlx-qwen35 request")
        self._loader = ThreadPoolExecutor(1, "mlx-qwen35 loading")
        self._idle = asyncio.Condition()
        self._background: set[asyncio.Task[Any]] = set()
        self.closing = self._closed = False

    # The Catalogue

    def models(self) -> Sequence[Listed]:
        return [place.listed(self.how.parallel) for place in self.places]

    async def load(self, name: str | None, ttl: float | None = None, context_length: int | None = None) -> Listed:
        place = await self.look_up(name)
        if context_length is not None and context_length != place.context_length:
            if place.loaded is not None and place.loaded.context_length != context_length:
                await self.unload(place.name)
            place.context_length = context_length
        lease = await self.lease(place, ttl)
        lease.release()
        return place.listed(self.how.parallel)

    async def unload(self, name: str) -> None:
        place = await self.look_up(name)
        if place.loading is not None:
            await asyncio.wait([place.loading])
        while place.loaded is not None:
            async with self._idle:
                await self._idle.wait_for(lambda: place.busy == 0)
            async with self._one_at_a_time:
                if place.busy == 0:
                    await self._unload(place)

    async def count(self, ask: Ask) -> int:
        place = await self.look_up_answerer(ask.model)
        try:
            if place.loaded is None and place.processor is None:
                place.processor = await self.in_thread(
                    lambda: load_processor(place.folder, context_length=self.how.context_length, yarn=self.how.yarn)
                )
            processor = place.loaded.processor if place.loaded is not None else place.processor
            return await self.in_thread(lambda: in_memory.count(processor, ask, fetch=self.how.fetch))
        except Exception as error:
            raise Refusal.of(error) from error

    # What answers

    async def look_up(self, name: str | None) -> Place:
        """The place of a name; None: of whichever model is loaded, or the first. Raises Refusal not_found."""
        if not name and self.places:
            return max(self.places, key=lambda place: (place.loaded is not None, place.loaded and place.used or 0))
        for again in (False, True):
            if again and (self._named or time.monotonic() < self._looked + LOOK_AGAIN):
                continue
            if again:
                self._looked = time.monotonic()
                self.places = await self.in_thread(lambda: places.on_this_machine(self.places))
            with suppress(Refusal):
                return self._of_name(name or "")
        if self._named and len(self.places) == 1:
            return self.places[0]
        raise not_found(name or "", self.models())

    async def look_up_answerer(self, name: str | None) -> Place:
        """The place that answers to a name: that of the name, or, where there is none, of the one model that is loaded:
        programs ask for models of their own makers. Raises Refusal not_found."""
        try:
            return await self.look_up(name)
        except Refusal:
            loaded = [place for place in self.places if place.loaded is not None]
            if len(loaded) != 1:
                raise
            return loaded[0]

    def _of_name(self, name: str) -> Place:
        for place in self.places:
            if place.asked == name:
                return place
        wanted = found(self, name).name
        return next(place for place in self.places if place.name == wanted)

    async def lease(self, place: Place, ttl: float | None = None) -> Lease:
        """The model of a place, loaded if it is not. ttl: as in Ask. Raises Refusal."""
        if self.closing:
            raise Refusal("unavailable", "the server is closing", retry_after=5)
        place.busy += 1
        if place.expiry is not None:
            place.expiry.cancel()
        begun, waited = time.monotonic(), False
        try:
            while place.loaded is None:
                waited = True
                if place.loading is None:
                    place.loading = asyncio.ensure_future(self._load(place))
                    place.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
                await asyncio.shield(place.loading)
        except BaseException as error:
            self._released(place)
            if isinstance(error, Refusal) or not isinstance(error, Exception):
                raise
            raise Refusal.of(error) from error
        place.ttl = self.ttl if ttl is None or ttl < 0 else ttl
        return Lease(self, place, place.loaded, time.monotonic() - begun if waited else 0.0)

    async def in_thread(self, call: Callable[[], _T]) -> _T:
        """What would hold up the others, on a thread of its own."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def close(self) -> None:
        """Ends what is answered, and gives all memory back."""
        if self._closed:
            return
        self.closing = self._closed = True
        for place in self.places:
            if place.expiry is not None:
                place.expiry.cancel()
            if place.loading is not None:
                place.loading.cancel()
        running = [place.loaded for place in self.places if place.loaded is not None]
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *(loop.run_in_executor(self._threads, each.close) for each in running), return_exceptions=True
        )
        for place in self.places:
            place.loaded = None
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._loader.shutdown(wait=False, cancel_futures=True)

    # Loading

    async def _load(self, place: Place) -> Loaded:
        try:
            async with self._one_at_a_time:
                memory = await self._make_room(place)
                place.share = 0.0

                def told(done: int, total: int) -> None:
                    if self._closed:
                        raise CheckpointError("the server is closing")
                    place.share = done / total if total else 0.0

                log.info("loading %s", place.name)
                loop = asyncio.get_running_loop()
                loaded = await loop.run_in_executor(
                    self._loader,
                    lambda: Loaded(
                        place.folder, self._how(place), memory, shares=len(self.places) > 1, on_progress=told
                    ),
                )
                if self._closed:
                    loaded.close()
                    raise Refusal("unavailable", "the server is closing", retry_after=5)
                place.loaded, place.processor = loaded, None
                log.info("loaded %s in %.1f s: %s", place.name, loaded.seconds, loaded)
                return loaded
        except Refusal:
            raise
        except Exception as error:
            log.warning("%s cannot be loaded: %s", place.name, error)
            known = isinstance(error, (CheckpointError, ArgumentError))
            why = str(error) if known else f"{type(error).__name__}; the server's log has the place"
            if not known:
                log.exception("loading %s failed", place.name, exc_info=error)
            raise Refusal("unavailable", f"{place.name} cannot be loaded: {why}") from error
        finally:
            place.loading = None

    def _how(self, place: Place) -> Loading:
        from dataclasses import replace

        how = self.how
        if place.context_length is not None:
            how = replace(how, context_length=place.context_length)
        return how if place.stored.mtp or not how.mtp or self._named else replace(how, mtp=False)

    async def _make_room(self, place: Place) -> int | str | None:
        """Unloads what is idle until the model fits -> the most that the process may take with it, as `load` has it.
        Raises Refusal where those in use leave too little, CheckpointError where it would not fit alone."""
        until = time.monotonic() + PATIENCE
        how = self._how(place)
        if how.ranks is not None and how.ranks > 1:
            return how.memory  # each rank decides that of its share
        while True:
            others = [each for each in self.places if each.loaded is not None and each is not place]
            memory = self._left(others)
            try:
                await self.in_thread(
                    lambda memory=memory: hold(
                        place.folder, memory, dtype=how.dtype, context_length=how.context_length, yarn=how.yarn
                    )
                )
                return memory
            except (CheckpointError, ArgumentError) as error:
                if not others:
                    raise
                idle = [each for each in others if each.busy == 0]
                if idle:
                    oldest = min(idle, key=lambda each: each.used)
                    log.info("unloading %s to make room for %s", oldest.name, place.name)
                    await self._unload(oldest)
                    continue
                wait = until - time.monotonic()

                def some_idle(others: Sequence[Place] = others) -> bool:
                    return any(each.busy == 0 for each in others)

                try:
                    async with self._idle:
                        await asyncio.wait_for(self._idle.wait_for(some_idle), max(0.0, wait))
                except (TimeoutError, asyncio.TimeoutError):
                    names = ", ".join(f"{each.name} ({shown_size(each.loaded.reserved)})" for each in others)
                    raise Refusal(
                        "unavailable", f"{error}. In use is {names}: ask again when that is idle", retry_after=30
                    ) from error

    def _left(self, others: Sequence[Place]) -> int | str | None:
        """What the process may take with one more model, as `load` has it."""
        if not others:
            return self.how.memory
        taken = sum(each.loaded.reserved for each in others)
        if self.how.memory is not None:
            return max(memory_size(self.how.memory)[0] - taken, 10**6)
        weights = sum(each.loaded.nbytes for each in others)
        return max(memory_left() - (taken - weights), 10**6)

    async def _unload(self, place: Place) -> None:
        """Under the lock of loads."""
        loaded, place.loaded = place.loaded, None
        if place.expiry is not None:
            place.expiry.cancel()
        if loaded is not None:
            await asyncio.get_running_loop().run_in_executor(self._loader, loaded.close)
            log.info("unloaded %s", place.name)

    def _released(self, place: Place) -> None:
        place.busy -= 1
        place.used, place.used_at = time.monotonic(), time.time()
        if self._closed:
            return
        self._later(self._tell())
        if place.busy == 0 and place.loaded is not None and place.ttl < math.inf:
            loop = asyncio.get_running_loop()
            if place.expiry is not None:
                place.expiry.cancel()
            place.expiry = loop.call_later(place.ttl, lambda: self._later(self._expire(place)))

    async def _tell(self) -> None:
        async with self._idle:
            self._idle.notify_all()

    async def _expire(self, place: Place) -> None:
        async with self._one_at_a_time:
            idle = time.monotonic() - place.used  # it may have been used while this waited
            if place.busy == 0 and idle > place.ttl - 0.01:
                await self._unload(place)

    def _later(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
