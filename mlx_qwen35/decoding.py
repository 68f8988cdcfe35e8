"""Tokens one after the other, each computed while the one before is read.

Knows when a step is computed and where the cache is then. Knows nothing of prompts, text or drafts.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import mlx.core as mx

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache, Snapshot
    from mlx_qwen35.model import Model
    from mlx_qwen35.sampling import History, Sampler

CLEAR_EVERY = 256  # steps between two returns of MLX's spare buffers, which grow with the KV cache

Drawn = tuple[mx.array, mx.array]  # token [B], logprobs [B, V], both perhaps not yet computed


@dataclass(frozen=True)
class Step:
    """tokens: one a row; logprobs: [B, V], lazy; before: the cache as it was before it took these tokens.

    after: the cache as it was when it had taken these tokens and no more; None: as it is when the step is yielded.
    from_draft: whether a drafter had proposed it. drafted: how many tokens were, since the step before.
    """

    tokens: list[int]
    logprobs: mx.array
    before: Snapshot
    after: Snapshot | None = None
    from_draft: bool = False
    drafted: int = 0


def decode(
    model: Model,
    cache: Cache,
    logits: mx.array,
    sampler: Sampler,
    history: History,
    *,
    max_tokens: int,
) -> Generator[Step, None, None]:
    """Draws tokens from `logits` [B, V] on, at most `max_tokens` a row; each is computed while the one before is read.

    When a step is yielded, the cache covers its tokens (`step.before` is the state without them).
    """
    if max_tokens >= 1:
        first = draw(logits, sampler, history)
        yield from steps(model, cache, first, sampler, history, count=max_tokens)


def draw(logits: mx.array, sampler: Sampler, history: History) -> Drawn:
    """A token from logits [B, V], on its way."""
    token, logprobs = sampler(logits, history)
    history.append(token)
    mx.async_eval(token)
    return token, logprobs


def steps(
    model: Model,
    cache: Cache,
    first: Drawn,
    sampler: Sampler,
    history: History,
    *,
    count: int,
    draw_more: bool = False,
    follow: Callable[[mx.array, mx.array], None] | None = None,
) -> Generator[Step, None, Drawn]:
    """`count` steps that begin with a token that is drawn already; each as `decode` has it.

    draw_more: one token more is drawn at the end, which the cache does not have; it is what the generator returns.
    follow(tokens [B, 1], hidden [B, 1, H]): called when the cache has taken a token.
    """
    token, logprobs = first
    for number in range(1, count + 1):
        before = cache.snapshot()
        try:
            hidden = model.hidden(token[:, None], cache)  # [B, 1, H]
            if follow:
                follow(token[:, None], hidden)
            if number < count or draw_more:
                next_token, next_logprobs = sampler(model.head(hidden)[:, -1], history)
                history.append(next_token)
                mx.async_eval(next_token, cache.arrays())
            else:  # nothing is drawn from it, but the cache has to cover it
                next_token, next_logprobs = token, logprobs
                mx.async_eval(cache.arrays())
            step = Step(token.tolist(), logprobs, before)
        except BaseException:
            cache.restore(before)
            raise
        yield step
        token, logprobs = next_token, next_logprobs
        if number % CLEAR_EVERY == 0:
            mx.clear_cache()
    return token, logprobs
