"""What may be asked of `stream_generate` and its kin: which arguments they take, and what their values may be.

Knows arguments, and how they become a prompt, a limit and drafts. Computes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeVar

from mlx_qwen35 import checks, speculative
from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.errors import ArgumentError, LengthError, PromptError
from mlx_qwen35.model.mtp import MTPHead
from mlx_qwen35.processor import Prompt
from mlx_qwen35.sampling import Sampling
from mlx_qwen35.sampling.thinking import AFTER, NO_WORDS, WORDS, Tags

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor

MOST_TOLD = 100  # tokens whose log probabilities are told beside each token

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class PromptOptions:
    """What the template is told beside the messages, and how pictures and videos are read; see `Processor.prompt`."""

    system: str | None = None
    tools: Sequence[Mapping[str, Any]] | None = ()
    enable_thinking: bool | None = None
    reasoning_effort: str | None = None
    preserve_thinking: bool | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None
    allow_control_tokens: bool = False
    continue_final_message: bool = False
    fps: float | None = None
    max_pixels: int | None = None
    fetch: bool = False

    def __post_init__(self) -> None:
        check_options(vars(self), "PromptOptions")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        return tuple(spec.name for spec in fields(cls))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PromptOptions:
        """Those among the arguments `given`."""
        return cls(**{name: given[name] for name in cls.names() if name in given})

    @property
    def said(self) -> dict[str, Any]:
        """What differs from saying nothing, as arguments of `Processor.prompt`."""
        values = {spec.name: (getattr(self, spec.name), spec.default) for spec in fields(self) if spec.name != "tools"}
        given = {name: value for name, (value, default) in values.items() if value != default}
        return given | ({"tools": list(self.tools)} if self.tools else {})

    @property
    def reading(self) -> dict[str, Any]:
        """How pictures and videos are read, as arguments of `Processor.prepare`."""
        return {"fps": self.fps, "max_pixels": self.max_pixels, "fetch": self.fetch}


def tags(processor: Processor, *, words: bool) -> Tags:
    """The tags of reasoning as this checkpoint's ids, and what closes it: `words` first, or at once.

    Raises ArgumentError if it has no such tokens.
    """
    tokenizer = processor.tokenizer
    opening, ending = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    if opening is None or ending is None:
        raise ArgumentError("thinking_budget: this checkpoint has no tokens <think> and </think>; leave it out")
    before = tokenizer.encode(WORDS if words else NO_WORDS)
    return Tags(opening, ending, (*before, ending, *tokenizer.encode(AFTER)))


def read_prompt(
    processor: Processor, prompt: Any, images: Sequence[Any], videos: Sequence[Any], options: PromptOptions
) -> Prompt:
    """The prompt as token ids and media. Raises PromptError for what makes none."""
    if not isinstance(prompt, Prompt):
        prompt = processor.prompt(prompt, images=images, videos=videos, **options.said)
    elif len(images) or len(videos):
        raise PromptError("a Prompt has its images and videos already: give them to processor.prompt, which makes it")
    elif lost := sorted(options.said.keys() - {"tools"}):  # these say how calls are read, too
        raise PromptError(f"a Prompt is made already: give {lost[0]}= to processor.prompt, which makes it")
    if len(prompt.tokens) == 0:
        raise PromptError("the prompt is empty; give at least one token")
    return prompt


def read_drafting(
    model: Model,
    sampling: Sampling,
    mtp: bool | None,
    draft_model: BlockDraftModel | MTPHead | Model | None,
    most: int | None,
    lookup: bool | None,
) -> speculative.Drafting | None:
    """What drafts, and how; None where nothing does. Raises ValueError for what cannot draft."""
    if draft_model is None and (mtp or mtp is None):
        draft_model = model.mtp
        if mtp and draft_model is None:
            raise ArgumentError("mtp=True, but the model was loaded without its MTP head: load it with mtp=True too")
    lookup = True if lookup is None else lookup
    usual, limit = speculative.most_of(draft_model)
    most = usual if most is None else most
    speculative.check_count(most, limit)
    if draft_model is None and not lookup:
        return None
    steady = draft_model is not None and sampling.seed is not None and sampling.temperature > 0
    drafting = speculative.Drafting(draft_model, most, steady=steady, lookup=lookup)
    drafting.check(model)
    return drafting


def one_each(media: Sequence[Sequence[Any]], name: str, prompts: int) -> Sequence[Sequence[Any]]:
    """Images or videos of a batch as one list a prompt."""
    if len(media) not in (0, prompts):
        raise PromptError(f"{name}= holds {len(media)} lists for {prompts} prompts; give one list a prompt")
    for at, row in enumerate(media):
        checks.some(f"{name}[{at}]", row, name)
    return media if len(media) else [()] * prompts


def limits_each(max_tokens: int | None | Sequence[int | None], prompts: int) -> Sequence[int | None]:
    """max_tokens of a batch as one a prompt."""
    if not isinstance(max_tokens, (list, tuple)):
        return [max_tokens] * prompts
    if len(max_tokens) != prompts:
        raise ArgumentError(f"max_tokens has {len(max_tokens)} numbers for {prompts} prompts; give one each, or one")
    return max_tokens


def check_covered(covered: int, tokens: int, held: int) -> None:
    """Raises PromptError or ArgumentError unless a cache with `held` tokens covers so many of a prompt."""
    if tokens == 0:
        raise PromptError("the prompt is empty; give at least one token")
    if covered and not 0 < covered == held < tokens:
        raise ArgumentError(
            f"covered is {covered}, the cache holds {held} tokens and the whole prompt has {tokens}: "
            "covered is what the cache holds, and leaves at least one token to compute"
        )


def room(prompt_tokens: int, cached_tokens: int, context_length: int) -> int:
    """How many tokens of answer fit; raises PromptError if none does."""
    used = prompt_tokens + cached_tokens
    if used >= context_length:
        held = f" after {cached_tokens} in the cache" if cached_tokens else ""
        raise LengthError(
            f"the prompt has {prompt_tokens} tokens{held}, and the context holds {context_length} with the answer; "
            "shorten the prompt or raise the context length",
            prompt_tokens,
            context_length - cached_tokens - 1,
        )
    return context_length - used


# Arguments, of whichever function takes them. Each check raises an ArgumentError.


def checked(*, options_of: Callable[..., Any] | None = None) -> Callable[[_Function], _Function]:
    """A function whose arguments are checked when it is called. options_of: whose names its **options may have."""

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        # by name only: what it has itself, and what it hands on
        names = [name for of in (function, options_of) if of for name in option_names(of)]

        @wraps(function)
        def call(*values: Any, **named: Any) -> Any:
            for name in named:
                if name not in names and name not in signature.parameters:
                    raise ArgumentError(_unknown(name, names, function.__name__))
            if values:
                checks.pair(function.__name__, values[0])
            try:
                bound = signature.bind(*values, **named)
            except TypeError as error:
                raise ArgumentError(f"{function.__name__}: {error}") from None
            given = dict(bound.arguments)
            given |= given.pop("options", {})
            checks.model_and_processor(function.__name__, given.pop("model"), given.pop("processor"))
            _check_values(given)
            return function(*values, **named)

        return call  # type: ignore[return-value]

    return decorate


def option_names(function: Callable[..., Any]) -> list[str]:
    """What it takes by name only."""
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def check_options(given: Mapping[str, Any], owner: str, *, names: Collection[str] = ()) -> None:
    """Checks options that are handed on later. names: which there are (none: theirs are right)."""
    for name in given:
        if names and name not in names:
            raise ArgumentError(_unknown(name, names, owner))
    _check_values(given)


def _unknown(name: str, names: Iterable[str], owner: str) -> str:
    drawn = [spec.name for spec in fields(Sampling)]
    if name in drawn or name == "temp":
        return f"{owner} has no option {name}; write sampling=Sampling({'temperature' if name == 'temp' else name}=...)"
    names = list(names)
    hint = checks.suggestion(_OTHER_NAMES.get(name, name), names)
    if not hint and (meant := checks.meant(name, drawn)):
        hint = f"; did you mean sampling=Sampling({meant}=...)?"
    return f"{owner} has no option {name}{hint or '; there are ' + ', '.join(names)}"


# What other libraries call it.
_OTHER_NAMES = {"max_new_tokens": "max_tokens", "max_completion_tokens": "max_tokens", "thinking": "enable_thinking"}
_OTHER_NAMES |= {"sampler": "sampling", "prompt_cache": "cache", "system_prompt": "system", "callback": "on_progress"}
_OTHER_NAMES |= {"prefill_step_size": "chunk_size", "max_thinking_tokens": "thinking_budget"}


def _check_values(given: Mapping[str, Any]) -> None:
    for name, value in given.items():
        if name == "max_tokens" and "prompts" in given and isinstance(value, (list, tuple)):
            for at, each in enumerate(value):
                _CHECKS[name](f"{name}[{at}]", each)
        elif check := _CHECKS.get(name):
            check(name, value)


def _check_sampling(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, Sampling):
        hint = "give a Sampling"
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            hint = f"write Sampling({', '.join(f'{key}={amount!r}' for key, amount in value.items())})"
        raise ArgumentError(f"{name} is {checks.shown(value)}; {hint}")


def _check_stop(name: str, value: Any) -> None:
    if isinstance(value, (bytes, Mapping)) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a text or a list of texts")
    for stop in [value] if isinstance(value, str) else value if isinstance(value, Collection) else ():
        if not isinstance(stop, str) or not stop:
            raise ArgumentError(f"{name} holds {checks.shown(stop)}; a stop string is a text that is not empty")


def _check_boundaries(name: str, value: Any) -> None:
    if isinstance(value, (str, bytes)) or not isinstance(value, Iterable):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a list of whole numbers")
    for boundary in value if isinstance(value, Collection) else ():
        checks.whole(f"a number of {name}", boundary, 0)


def _check_fps(name: str, value: Any) -> None:
    if value is not None:
        checks.number(name, value)
        if value <= 0:
            raise ArgumentError(f"{name} is {value}; it must be above 0")


def _check_deadline(name: str, value: Any) -> None:
    if value is not None:
        checks.number(name, value)
        if value <= 0:
            raise ArgumentError(f"{name} is {value}; give seconds from now, or None for no limit")


def _check_priority(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a whole number: higher goes first")


def _check_cancel(name: str, value: Any) -> None:
    if value is not None and not callable(value) and not hasattr(value, "is_set"):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a function or a threading.Event")


def _check_session(name: str, value: Any) -> None:
    if value is not None and not hasattr(value, "go_on"):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a Session, or load_session(file, model, processor)")


def _check_store(name: str, value: Any) -> None:
    if value is not None and not hasattr(value, "seed"):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give a Store(model, processor, most_bytes=...)")


def _check_cache(name: str, value: Any) -> None:
    if value is not None and not hasattr(value, "snapshot"):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give what model.make_cache() made")


def _check_covered_number(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # `check_covered` knows which numbers there are
        checks.whole(name, value, 0)


def _check_draft_model(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, (MTPHead, BlockDraftModel)) and not checks.is_model(value):
        raise ArgumentError(f"{name} is {checks.shown(value)}; give what load_draft_model returns")


def _check_draft_tokens(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral):  # what drafts knows how many there may be
        checks.whole(name, value, 1, otherwise="for as many as what drafts usually has")


def _check_prompts(name: str, value: Any) -> None:
    if isinstance(value, Prompt) or hasattr(value, "tolist"):
        raise ArgumentError(f"{name} is one prompt; give a list: [prompt]")
    checks.some(name, value, "prompts")
    if len(value) and isinstance(value[0], Mapping):
        raise ArgumentError(f"{name} is one conversation; give a list of prompts: [messages]")


_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "prompts": _check_prompts,
    "images": lambda name, value: checks.some(name, value, name),
    "videos": lambda name, value: checks.some(name, value, name),
    "fps": _check_fps,
    "max_pixels": lambda name, value: checks.whole(name, value, 1, otherwise="for the checkpoint's own"),
    "fetch": checks.flag,
    "system": lambda name, value: checks.text(name, value, optional=True),
    "tools": lambda name, value: checks.some(name, () if value is None else value, name),
    "enable_thinking": lambda name, value: checks.flag(name, value, otherwise="for what the template does"),
    "reasoning_effort": lambda name, value: checks.text(name, value, optional=True),
    "preserve_thinking": lambda name, value: checks.flag(name, value, otherwise="for what the template does"),
    "chat_template_kwargs": checks.mapping,
    "allow_control_tokens": checks.flag,
    "continue_final_message": checks.flag,
    "max_tokens": lambda name, value: checks.whole(name, value, 0, otherwise="for what the context leaves"),
    "thinking_budget": lambda name, value: checks.whole(name, value, 0, otherwise="for no budget"),
    "sampling": _check_sampling,
    "stop": _check_stop,
    "session": _check_session,
    "store": _check_store,
    "cache": _check_cache,
    "covered": _check_covered_number,
    "context_length": lambda name, value: checks.whole(name, value, 2, otherwise="for what was said at loading"),
    "mtp": lambda name, value: checks.flag(name, value, otherwise="for what was loaded"),
    "draft_model": _check_draft_model,
    "lookup": lambda name, value: checks.flag(name, value, otherwise="for yes"),
    "num_draft_tokens": _check_draft_tokens,
    "n": lambda name, value: checks.whole(name, value, 1),
    "most_rows": lambda name, value: checks.whole(name, value, 1),
    "logprobs": checks.flag,
    "call_pieces": checks.flag,
    "top_logprobs": lambda name, value: checks.whole(name, value, 0, MOST_TOLD),
    "deadline": _check_deadline,
    "priority": _check_priority,
    "strict": lambda name, value: checks.flag(name, value, otherwise="for what the tools say"),
    "chunk_size": lambda name, value: checks.whole(name, value, 1, otherwise="for what the model says"),
    "boundaries": _check_boundaries,
    "on_progress": checks.called,
    "cancel": _check_cancel,
    "content_only": checks.flag,
    "verbose": checks.flag,
}
