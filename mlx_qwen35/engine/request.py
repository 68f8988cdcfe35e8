"""What is asked of the engine: one prompt, and all that its answer needs beside the model.

Knows how arguments that were checked become a sampler, a limit, a matcher and drafts. Computes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import speculative
from mlx_qwen35.engine.allowed import PromptOptions, check_covered, read_drafting, read_prompt, room, tags
from mlx_qwen35.engine.asked import Computed, Course, Drafters, Form
from mlx_qwen35.errors import ArgumentError, GrammarError
from mlx_qwen35.sampling import History, Sampler, Sampling
from mlx_qwen35.sampling.steps import bias_row
from mlx_qwen35.sampling.thinking import Tags, ThinkingBudget
from mlx_qwen35.text.parts import AnswerText

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.cache import Cache
    from mlx_qwen35.engine.options import Cancel
    from mlx_qwen35.grammar import Grammar, Matcher
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.session import Session


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
    options, form, course = PromptOptions.of(given), Form.of(given), Course.of(given)
    computed, drafters = Computed.of(given), Drafters.of(given)
    computed.check(model, course.n)
    tools = options.tools or ()
    grammar = form.grammar(processor, tools)
    prompt = read_prompt(processor, prompt, given.get("images") or (), given.get("videos") or (), options)
    check_covered(computed.covered, len(prompt.tokens), computed.offset)
    if prompt.media:
        model.placement([prompt.tokens], [prompt.media], computed.cache, covered=computed.covered)
    left = room(len(prompt.tokens), computed.offset - computed.covered, course.context(processor))
    sampling = given.get("sampling") or Sampling.from_generation_config(processor.generation_config)
    if sampling.logit_bias:
        bias_row(sampling.logit_bias, processor.tokenizer.vocab_size)  # refuses ids that there are not
    drafting = read_drafting(
        model, sampling, drafters.mtp, drafters.draft_model, drafters.num_draft_tokens, drafters.lookup
    )
    budget, stop, boundaries = course.thinking_budget, course.stops, tuple(course.boundaries)
    closing = None if budget is None else tags(processor, words=budget > 0)

    def one(index: int) -> Request:
        answer = AnswerText(
            processor.tokenizer,
            processor.eos_token_ids,
            thinking=prompt.thinking,
            continued=prompt.continued,
            tools=tools,
            stop=stop,
            call_pieces=course.call_pieces,
        )
        return Request(
            prompt=prompt,
            sampling=sampling.for_answer(index),
            vocab_size=model.config.text.vocab_size,
            tokens=processor.tokenizer.vocab_size,
            budget=None if closing is None else (budget, closing),
            limit=left if course.max_tokens is None else min(course.max_tokens, left),
            answer=answer,
            cancelled=cancel_check(course.cancel),
            matcher=None if grammar is None else _matcher(grammar, processor, prompt),
            drafting=copy(drafting),
            session=computed.session,
            cache=computed.cache,
            covered=computed.covered,
            features=computed.features,
            chunk_size=course.chunk_size,
            boundaries=boundaries,
            on_progress=course.on_progress,
            top=course.top_logprobs if course.logprobs or course.top_logprobs else None,
            priority=course.priority,
            deadline=course.deadline,
            index=index,
        )

    first = one(0)
    first.others = [one(index) for index in range(1, course.n)]
    return first


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
