"""A model that computes nothing, for tests of who waits for whom: its caches grow and are counted, and cost no time.

Knows what the loop, rows and the store ask of a model.
"""

from __future__ import annotations

import random
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import mlx.core as mx

from mlx_qwen35.cache import Cache, DeltaState, KVCache
from mlx_qwen35.cache.ragged import RaggedCache
from mlx_qwen35.cache.rows import RowsCache
from mlx_qwen35.engine.group import Group, Seat
from tests.talkers import VOCAB

LONGEST = 2048  # tokens of a call
PER_TOKEN = 64  # bytes: keys and values of one head of eight
PER_ROW = 4 * (16 + 512) + 256 * PER_TOKEN  # bytes: states, and what a cache is rounded up by


class Broken(Exception):
    """What computing sometimes ends with."""


class Still:
    """chunk: of prompts. rate: how often a call fails."""

    config = SimpleNamespace(text=SimpleNamespace(vocab_size=VOCAB))
    mtp = expert_stats = None
    snapshot_bytes = 1 << 20

    def __init__(self, chunk: int, rate: float = 0.0, seed: int = 0) -> None:
        self.prefill_chunk, self.rate = chunk, rate
        self.together: list[list[int]] = []  # lengths of the pieces of each call that had several
        self._chance = random.Random(seed)
        self._logits = mx.zeros((16, 1, VOCAB))
        self._positions = mx.zeros((1, 1, LONGEST, 8))
        self._states = mx.zeros((1, 1, 4)), mx.zeros((1, 1, 4, 32))
        mx.eval(self._logits, self._positions, self._states)

    def computing(self, tokens: int) -> AbstractContextManager[None]:
        return nullcontext()

    def make_cache(self) -> Cache:
        return Cache([KVCache(), DeltaState()])

    def hidden(self, tokens: mx.array, cache: Any, media=(), *, more: bool = False, **how) -> mx.array:
        rows, length = tokens.shape
        if self._chance.random() < self.rate:
            raise Broken("computing failed")
        if isinstance(cache, RaggedCache):
            return self._pieces(cache)
        new = self._positions[:, :, :length]
        for own in cache.rows if isinstance(cache, RowsCache) else [cache]:
            own.layers[0].update(new, new)
        if not isinstance(cache, RowsCache):
            state = cache.layers[1]
            if state.steps is None:
                state.update(*self._states)
            else:
                state.update_each(*([each] * len(state.ends(length)) for each in self._states), length)
        cache.advance(length)
        return mx.broadcast_to(self._logits[:rows], (rows, length if rows == 1 else 1, VOCAB))

    def _pieces(self, cache: RaggedCache) -> mx.array:
        """A piece of each of several prompts."""
        self.together.append(cache.lengths)
        keys, states = cache.layers
        for own, span in keys.parts:
            new = self._positions[:, :, span]
            own.update(new, new)
        conv, matrix = self._states
        for block in states.blocks:
            before = states.of(block)
            ends = [block.length] if before.steps is None else before.ends(block.length)
            rows = len(block.rows)
            windowed = mx.broadcast_to(conv, (rows, conv.shape[1] + block.length, conv.shape[2]))
            one = matrix if len(ends) == 1 else matrix[:, None]
            matrices = mx.broadcast_to(one, (rows, *([len(ends)] if len(ends) > 1 else []), *matrix.shape[1:]))
            states.take(block, windowed, matrices, ends)
        length = sum(cache.lengths)
        cache.advance(length)
        return mx.broadcast_to(self._logits[:1], (1, length, VOCAB))

    def head(self, hidden: mx.array) -> mx.array:
        return hidden


class Alone:
    """In place of Drafted: plain steps of a row by itself, as one that always drafts takes rounds."""

    def __init__(self, model: Still, seat: Seat) -> None:
        self._group, self._seat = Group(model), seat
        self._group.change(joining=[seat])

    def steps(self, left: int) -> list:
        return self._group.step(drawing=left > 1)

    def stop(self) -> None:
        self._group.change(leaving=[self._seat])


class Clock:
    """Seconds of a busy machine: most calls take little, some long."""

    def __init__(self, seed: int) -> None:
        self.now, self._chance = 0.0, random.Random(seed)

    def __call__(self) -> float:
        busy = self._chance.random() < 0.1
        self.now += self._chance.uniform(0, 3) if busy else 10 ** self._chance.uniform(-5, -1)
        return self.now
