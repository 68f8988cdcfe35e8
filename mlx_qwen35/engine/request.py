"""What is asked of the engine: one prompt, and all that its answer needs beside the model.

Knows how arguments that were checked become a sampler, a limit, a matcher and drafts. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import speculative
from mlx_qwen35.errors import ArgumentError, GrammarError
from mlx_qwen35.parts import AnswerText
from mlx_qwen35.request import PromptOptions, check_covered, read_drafting, read_prompt, room, tags
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.steps import bias_row
from mlx_qwen35.thinking import Tags, ThinkingBudget

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.cache import Cache
    from mlx_qwen35.grammar import Grammar, Matcher
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.session import Session

Cancel = Any  # a callable () -> bool, anything with is_set() (threading.Event), or None


def cancel_check(cancel: Cancel) -> Callable[[], bool]:
    """Whether the work is to end, asked of any form of `cancel`."""
    if cancel is None:
        return lambda: False
    return cancel.is_set if hasattr(cancel, "is_set") else cancel


@dataclass
class Request:
    """One answer that is wanted; no array of a device is in it, but for what it goes on from.

    limit: tokens at the most. top: how many likeliest tokens are told with each; None: nothing is told. deadline:
    seconds from when it is submitted. index: which of the answers to one prompt it is. The other fields are options of
    `generation.stream_generate`.
    """

    prompt: Prompt
    sampling: Sampling
    vocab_size: int
    limit: int
    answer: AnswerText
    cancelled: Callable[[], bool]
    tokens: int | None = None  # that the tokenizer has; None: as many as the head has rows
    budget: tuple[int, Tags] | None = None  # of reasoning, and the tags that close it
    matcher: Matcher | None = None
    drafting: speculative.Drafting | None = None
    session: Session | None = None
    cache: Cache | None = None
    covered: int = 0
    features: MutableMapping[str, mx.array] | None = None
    chunk_size: int | None = None
    boundaries: tuple[int, ...] = ()
    on_progress: Callable[[int, int], None] | None = None
    top: int | None = None
    priority: int = 0
    deadline: float | None = None
    index: int = 0
    others: list[Request] = field(default_factory=list)  # further answers to the same prompt

    def sampler(self) -> tuple[Sampler, History]:
        """How its tokens are drawn, from the first on; made on the thread that computes."""
        thinking = None if self.budget is None else ThinkingBudget(*self.budget, [self.prompt.thinking])
        history = History(self.sampling, [self.prompt.tokens], self.vocab_size, budget=thinking)
        return Sampler(self.sampling, self.tokens), history

    @property
    def steady(self) -> bool:
        """Whether it drafts whatever that costs, and so cannot take its steps with others."""
        return self.drafting is not None and self.drafting.steady


def read(model: Model, processor: Processor, prompt: Any, given: Mapping[str, Any]) -> Request:
    """The request that options of `stream_generate`, by name, make of a prompt; what is not among them is as there.

    Raises PromptError or ArgumentError for what cannot be done.
    """
    options, ask = PromptOptions.of(given), given.get
    session, cache, covered = ask("session"), ask("cache"), ask("covered") or 0
    if cache is not None and ask("store") is not None:
        raise ArgumentError("a cache that is given is gone on with as it is: give it or a store, not both")
    if ask("store") is not None and ask("store").model is not model:
        raise ArgumentError("the store is another model's: give the model that it was made with")
    if session is not None and (cache is not None or covered):
        raise ArgumentError("a session has a cache of its own, and knows what it covers: give it alone")
    if session is not None and session.model is not model:
        raise ArgumentError("the session is another model's: give the model that it was made with (session.model)")
    count = ask("n") or 1
    if count > 1 and (session is not None or cache is not None):
        raise ArgumentError(f"n is {count}, and a session or cache goes on with one answer: leave one of them out")
    grammar = _grammar(processor, options.tools or (), given)
    prompt = read_prompt(processor, prompt, ask("images") or (), ask("videos") or (), options)
    offset = 0 if cache is None else cache.offset
    check_covered(covered, len(prompt.tokens), offset)
    if prompt.media:
        model.placement([prompt.tokens], [prompt.media], cache, covered=covered)
    context = _context(processor, ask("context_length"))
    left = room(len(prompt.tokens), offset - covered, context)
    max_tokens = ask("max_tokens")
    sampling = ask("sampling") or Sampling.from_generation_config(processor.generation_config)
    vocab_size = model.config.text.vocab_size
    if sampling.logit_bias:
        bias_row(sampling.logit_bias, processor.tokenizer.vocab_size)  # refuses ids that there are not
    drafting = read_drafting(model, sampling, ask("mtp"), ask("draft_model"), ask("num_draft_tokens"))
    stop = ask("stop") or ()
    stop = (stop,) if isinstance(stop, str) else tuple(stop)
    budget = ask("thinking_budget")
    closing = None if budget is None else tags(processor, words=budget > 0)
    asks_top = ask("logprobs") or ask("top_logprobs")

    def one(index: int) -> Request:
        drawn = sampling.for_answer(index)
        reading = {"thinking": prompt.thinking, "continued": prompt.continued}
        reading |= {"tools": options.tools or (), "stop": stop, "call_pieces": bool(ask("call_pieces"))}
        return Request(
            prompt=prompt,
            sampling=drawn,
            vocab_size=vocab_size,
            tokens=processor.tokenizer.vocab_size,
            budget=None if closing is None else (budget, closing),
            limit=left if max_tokens is None else min(max_tokens, left),
            answer=AnswerText(processor.tokenizer, processor.eos_token_ids, **reading),
            cancelled=cancel_check(ask("cancel")),
            matcher=None if grammar is None else _matcher(grammar, processor, prompt),
            drafting=copy(drafting),
            session=session,
            cache=cache,
            covered=covered,
            features=ask("features"),
            chunk_size=ask("chunk_size"),
            boundaries=tuple(ask("boundaries") or ()),
            on_progress=ask("on_progress"),
            top=(ask("top_logprobs") or 0) if asks_top else None,
            priority=ask("priority") or 0,
            deadline=ask("deadline"),
            index=index,
        )

    first = one(0)
    first.others = [one(index) for index in range(1, count)]
    return first


def _context(processor: Processor, wanted: int | None) -> int:
    if wanted is not None and wanted > processor.context_length:
        raise ArgumentError(
            f"context_length is {wanted}, and the model was loaded for {processor.context_length}: give as much or "
            "less, or load it with a larger one"
        )
    return wanted or processor.context_length


def _grammar(processor: Processor, tools: Sequence[Mapping[str, Any]], given: Mapping[str, Any]) -> Grammar | None:
    """The form that an answer is to have; None: any."""
    names = ("response_format", "tool_choice", "strict")
    asked = {name: given[name] for name in names if given.get(name) is not None}
    if not asked:
        return None
    from mlx_qwen35.grammar import Grammar  # which takes a moment to load

    return Grammar.of(processor, tools=tools, **asked)


def _matcher(grammar: Grammar, processor: Processor, prompt: Prompt) -> Matcher:
    """The place in the form where the answer begins, or goes on."""
    matcher = grammar.matcher(thinking=prompt.thinking)
    if prompt.continued and not prompt.thinking:
        try:
            for token in processor.tokenizer.encode(prompt.continued, plain=True):
                matcher.advance(token)
        except GrammarError:
            raise ArgumentError(
                "continue_final_message: what there is of the answer does not fit its form; leave response_format and "
                "tool_choice out, or begin it otherwise"
            ) from None
    return matcher


def flattened(request: Request) -> Sequence[Request]:
    """It and the further answers to its prompt."""
    return [request, *request.others]
