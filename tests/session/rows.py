"""Rows that compute prompts piece by piece on a store's sessions, as an engine does, one step of one row at a time."""

import mlx.core as mx
import numpy as np

from mlx_qwen35.generation import prefill
from mlx_qwen35.processor import Prompt
from mlx_qwen35.session.store import Store


class Row:
    """A prompt on its way through a store. computed: tokens of it so far; logits [V]: of what comes next."""

    def __init__(self, store: Store, prompt: Prompt, *, chunk: int = 64, drafting=None, own=None) -> None:
        self.store, self.prompt, self.chunk, self.drafting, self.own = store, prompt, chunk, drafting, own
        self.session, self.computed, self.logits, self.said = None, 0, None, []
        self._using = None

    def begin(self) -> bool:
        """False: it has to wait."""
        if self.own is None:
            self.session = self.store.begin(self.prompt)
        elif self.store.seed(self.own, self.prompt):
            self.session = self.own
        if self.session is None:
            return False
        self._using = self.session.answering()
        self._using.__enter__()
        self.session.go_on(self.prompt)
        if self.drafting is not None:
            self.session.cache.draft = self.drafting.drafter(self.session.model, self.session.cache)
        return True

    def step(self) -> bool:
        """A piece of the prompt, or a token of the answer; whether the prompt is done."""
        model, cache, tokens = self.session.model, self.session.cache, self.prompt.tokens
        if cache.offset < len(tokens):
            stops = [at for at in self.session.meetings if at > cache.offset]
            end = min([cache.offset + self.chunk, len(tokens), *stops])
            length = end - cache.offset
            whole = prefill(
                model,
                tokens,
                cache,
                media=self.prompt.media,
                covered=cache.offset,
                boundaries=[length],
                chunk_size=self.chunk,
                cancel=Stop(),
            )
            self.computed += length
            self.session.reached(self.chunk)
            if cache.offset == len(tokens):
                self.logits = whole[0]
        else:
            token = int(mx.argmax(self.logits).item())
            hidden = model.hidden(mx.array([[token]]), cache)
            if cache.draft is not None:
                cache.draft.follow(mx.array([[token]]), hidden)
            self.logits = model.head(hidden)[0, -1]
            mx.eval(self.logits, cache.arrays())
            self.said.append(token)
            self.session.reached(1)
        return cache.offset >= len(tokens)

    def end(self) -> None:
        self.session.settle([*self.prompt.tokens, *self.said])
        self._using.__exit__(None, None, None)
        self.store.settled(self.session)

    def fail(self) -> None:
        self._using.__exit__(None, None, None)
        self.store.drop(self.session)


class Stop:
    """Cancels a prefill after its first piece."""

    def __init__(self) -> None:
        self.asked = 0

    def is_set(self) -> bool:
        self.asked += 1
        return self.asked > 1


def answered(store: Store, prompt: Prompt, answer: int = 0, **options) -> Row:
    """A row that computes a prompt, which need not wait, and says some tokens."""
    row = Row(store, prompt, **options)
    assert row.begin()
    while not row.step():
        pass
    for _ in range(answer):
        row.step()
    row.end()
    return row


def together(store: Store, prompts: list[Prompt], answer: int = 0, **options) -> list[Row]:
    """Rows that come at once: in each turn those who wait ask again, and one after the other makes a step."""
    rows = [Row(store, prompt, **options) for prompt in prompts]
    waiting, running = list(rows), []
    while waiting or running:
        begun = [row for row in waiting if row.begin()]
        waiting = [row for row in waiting if row not in begun]
        running += begun
        for row in list(running):
            if row.step() and len(row.said) >= answer:
                row.end()
                running.remove(row)
    return rows


def fresh(model, prompt: Prompt) -> np.ndarray:
    """The logits of what comes after a prompt that is computed from the beginning."""
    return np.array(model(mx.array([prompt.tokens]), None, list(prompt.media))[0, -1])
