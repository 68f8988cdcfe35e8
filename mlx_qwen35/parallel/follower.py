"""A rank other than 0: does what it is told, until it is told to end or something is lost.

Knows points, calls and files of shares. Decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import Cache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.parallel import kept, progress
from mlx_qwen35.parallel.call import NONE, ONE, Call, has_embedded
from mlx_qwen35.parallel.early import Watcher, end_at_once
from mlx_qwen35.parallel.later import Job, Later
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.points import Mirrors
from mlx_qwen35.parallel.ranks import read_bytes
from mlx_qwen35.parallel.wire import BYTES, END, FAILED, FRAME, TOLD
from mlx_qwen35.vision.sight import Sight

_NAMING = 3.0  # seconds that an error waits for rank 0's word of who is lost


class Follower:
    """One rank's half of the conversation."""

    def __init__(self, watched: Watcher, rank: int) -> None:
        self._rank, self._watched = rank, watched
        self.progress = watched.progress
        self._mirrors = Mirrors()
        self._steps = 0
        self._later: Later | None = None
        self._last: mx.array | None = None  # what came of the last call

    def next(self) -> tuple[bytes, Any]:
        """The next message, JSON read."""
        kind, body = self._watched.next()
        return (kind, json.loads(bytes(body))) if kind == TOLD else (kind, body)

    def tell(self, **what: Any) -> None:
        self._watched.tell(**what)

    def told(self, name: str) -> dict[str, Any]:
        """What rank 0 says next, which is to be of this kind; where that ends, this process does."""
        kind, body = self.next()
        if kind == END:
            raise SystemExit(0)
        if kind != TOLD or name not in body:
            raise ValueError(f"rank 0 was to say {name}")
        return body

    def failed(self, error: BaseException) -> None:
        """Tells rank 0 of what went wrong here, and ends. Where another is lost, rank 0 says who, and that is told."""
        if isinstance(error, RuntimeError):  # as MLX's of a lost connection
            time.sleep(_NAMING)  # rank 0's word ends this process
        self._watched.send(FAILED, f"{type(error).__name__}: {error}".encode())
        time.sleep(0.2)
        end_at_once(f"rank {self._rank}: {error}")

    def follow(self, model: RanksModel) -> None:
        """Until rank 0 ends in good order."""
        try:
            while True:
                kind, body = self.next()
                if kind == END:
                    if self._later is not None:
                        self._later.wait()
                    return
                if kind == FRAME:
                    call = self._call(bytes(body))
                    with self.progress.working(progress.allowed(call.tokens.size)):
                        self._compute(model, call)
                elif kind == TOLD:
                    with self.progress.working(progress.WRITES):
                        answer = self._answer(model, body)
                    self._watched.tell(**answer)
        except BaseException as error:
            self.failed(error)

    def _call(self, body: bytes) -> Call:
        """What a frame says, with what may follow it."""
        frame, embedded = np.frombuffer(body, np.int32), None
        if has_embedded(frame):
            parts = [self.next() for _ in range(2)]
            assert all(kind == BYTES for kind, _ in parts)
            embedded = tuple(read_bytes(part) for _, part in parts)
        return Call.read(frame, embedded)

    def _compute(self, model: RanksModel, call: Call) -> None:
        self._mirrors.drop(call.dropped)
        cache = self._cache(model, call)
        tokens = mx.array(call.tokens)
        model._returned = call.tokens.shape[1] if call.wanted < 0 else call.wanted
        sight = None if call.embedded is None else Shown(*call.embedded, call.tokens.shape)
        snapshots = []
        if isinstance(cache, Cache) and call.each is not None:
            with cache.each_step(call.each or None) as snapshots:
                x = model.computed(tokens, cache, sight or (), more=call.more, best=call.best)
        else:
            x = model.computed(tokens, cache, sight or (), more=call.more, best=call.best)
        self._last = x
        self._keep(call, cache, snapshots)
        self._steps += 1
        if self._steps % 256 == 0 or call.tokens.shape[1] > 1:
            mx.clear_cache()

    def _cache(self, model: RanksModel, call: Call) -> Cache | RowsCache | None:
        if call.kind == NONE:
            return None
        if call.kind == ONE:
            (past,) = call.pasts
            if past.point:
                cache = self._mirrors.at(past.point, past.kept)
            else:
                cache = model.make_cache(call.tokens.shape[0], past.padding or None)
            cache.rope_delta = past.deltas[0] if len(past.deltas) == 1 else past.deltas
            return cache
        rows = self._mirrors.rows([past.point for past in call.pasts], [past.kept for past in call.pasts])
        for cache, past in zip(rows.rows, call.pasts, strict=True):
            cache.rope_delta = past.deltas[0]
        return rows

    def _keep(self, call: Call, cache: Cache | RowsCache | None, snapshots: list[Any]) -> None:
        if cache is None:
            return
        if snapshots:
            few = not call.each  # drafts: most of them are gone with the next call
            for number, snapshot in zip(call.numbers, snapshots, strict=True):
                self._mirrors.add(number, cache, snapshot if few else snapshot.detached())
        for held, past in zip([cache] if isinstance(cache, Cache) else cache.rows, call.pasts, strict=True):
            if past.after not in call.numbers:
                self._mirrors.add(past.after, held)

    def _pasts(self, numbers: list[int]) -> list[kept.Past | None]:
        return [self._mirrors.snapshot(number) if number else None for number in numbers]

    def _later_of(self, model: RanksModel) -> Later:
        if self._later is None:
            self._later = Later(model.group.rank, model.group.size)
        return self._later

    def _answer(self, model: RanksModel, told: dict[str, Any]) -> dict[str, Any]:
        try:
            if "save" in told:
                path = kept.path_of(Path(told["save"]), model.group.rank, model.group.size, told["name"])
                kept.write(path, told["name"], self._pasts(told["points"]))
            elif "put" in told:
                replaced = None if told["replaced"] is None else Path(told["replaced"])
                share = kept.packed(self._pasts(told["points"]))
                self._later_of(model).put(Job(Path(told["put"]), told["name"], share, replaced, told["most_bytes"]))
            elif "written" in told:
                self._later_of(model).wait()
            elif "load" in told:
                self._later_of(model).wait()
                path = kept.path_of(Path(told["load"]), model.group.rank, model.group.size, told["name"])
                for number, found in zip(told["points"], kept.read(path, told["name"], model.make_cache), strict=True):
                    if number and found is not None:
                        self._mirrors.add(number, *found)
                os.utime(path)  # the one that was used last
            elif "keep" in told:
                kept.keep(Path(told["keep"]), model.group.rank, model.group.size, told["name"])
            elif "statistics" in told:
                return statistics(model) | {"hash": hash_of(self._last)}
        except (OSError, ValueError) as error:
            return {"problem": f"{error}"}
        return {"problem": None}


def statistics(model: RanksModel) -> dict[str, Any]:
    """What a rank has come to: memory, messages, experts."""
    stats, traffic = model.expert_stats, model.group.traffic
    return {
        "memory": mx.get_active_memory(),
        "peak": mx.get_peak_memory(),
        "messages": traffic.messages,
        "bytes": traffic.nbytes,
        "experts": None if stats is None else vars(stats),
    }


def hash_of(array: mx.array | None) -> str | None:
    """Equal for the same bits."""
    values = None if array is None else np.array(array.astype(mx.float32))
    return None if values is None else hashlib.blake2b(values.tobytes(), digest_size=16).hexdigest()


class Shown(Sight):
    """Embeddings and positions that rank 0 made of tokens and pictures."""

    def __init__(self, embedded: mx.array | None, positions: mx.array, shape: tuple[int, ...]) -> None:
        object.__setattr__(self, "_embedded", embedded)
        object.__setattr__(self, "_positions", positions)
        object.__setattr__(self, "_shape", tuple(shape))

    @property
    def shape(self) -> tuple[int, ...]:
        return self._shape

    @property
    def positions(self) -> mx.array:
        return self._positions

    @property
    def next_positions(self) -> list[int]:
        """Rank 0 says it with the next call."""
        return [0] * self._shape[0]

    def written_into(self, x: mx.array) -> mx.array:
        return x if self._embedded is None else self._embedded
