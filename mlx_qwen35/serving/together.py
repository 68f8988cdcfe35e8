"""Several prompts of one request, as one Answering whose answers are numbered on from prompt to prompt.

Knows Answerings. Knows neither models nor interfaces.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from mlx_qwen35.serving.answering import EngineAnswering
from mlx_qwen35.serving.exchange import Alive, Finished, Usage

if TYPE_CHECKING:
    from mlx_qwen35.serving.exchange import Ask
    from mlx_qwen35.serving.pool import Pool
    from mlx_qwen35.text.parts import Part

_AHEAD = 32  # parts that are taken before they are read


class Together:
    """An Answering of several, each of which is asked at once. As EngineAnswering it has to be closed."""

    def __init__(self, each: Sequence[EngineAnswering], answers: int) -> None:
        """answers: to each of the prompts."""
        self._each, self._answers = each, answers
        self.model, self.id, self.created = each[0].model, each[0].id, each[0].created

    @classmethod
    async def of(cls, pool: Pool, ask: Ask) -> Together:
        """Raises Refusal not_found."""
        asks = [replace(one, others=()) for one in (ask, *ask.others)]
        each: list[EngineAnswering] = []
        try:
            for one in asks:
                each.append(await EngineAnswering.of(pool, one))
        except BaseException:
            for answering in each:
                answering.close()
            raise
        return cls(each, ask.options.get("n") or 1)

    @property
    def usage(self) -> Usage:
        total = Usage()
        for answering in self._each:
            for name, value in vars(answering.usage).items():
                setattr(total, name, getattr(total, name) + value)
        return total

    @property
    def prompt_seconds(self) -> float:
        return max(answering.prompt_seconds for answering in self._each)

    @property
    def answer_seconds(self) -> float:
        return max(answering.answer_seconds for answering in self._each)

    @property
    def load_seconds(self) -> float:
        return max(answering.load_seconds for answering in self._each)

    @property
    def answering(self) -> bool:
        return any(answering.answering for answering in self._each)

    @property
    def ended(self) -> str:
        return ", ".join(dict.fromkeys(filter(None, (answering.ended for answering in self._each))))

    async def started(self, within: float | None = None) -> bool:
        """As of one, of all."""
        return all(await asyncio.gather(*(answering.started(within) for answering in self._each)))

    async def __aiter__(self) -> AsyncIterator[Part | Alive]:
        """Whatever comes first; an error of one ends all."""
        queue: asyncio.Queue[Part | Alive | BaseException | None] = asyncio.Queue(_AHEAD)

        async def forward(number: int, answering: EngineAnswering) -> None:
            try:
                async for item in answering:
                    shifted = isinstance(item, Alive) or number == 0
                    await queue.put(item if shifted else replace(item, index=item.index + number * self._answers))
                await queue.put(None)
            except Exception as error:
                await queue.put(error)

        tasks = [asyncio.ensure_future(forward(*numbered)) for numbered in enumerate(self._each)]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if item is None:
                    running -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.close()

    async def finished(self) -> list[Finished]:
        """All answers, when they have ended."""
        made = await asyncio.gather(*(answering.finished() for answering in self._each))
        return [one for answers in made for one in answers]

    def token_text(self, token: int) -> str:
        """A token as text."""
        return self._each[0].token_text(token)

    def token_bytes(self, token: int) -> bytes:
        """A token as bytes."""
        return self._each[0].token_bytes(token)

    def close(self) -> None:
        """Ends what runs, and lets the model go."""
        for answering in self._each:
            answering.close()
