"""A conversation as the text of a prompt in which what the template wrote and what people wrote can be told apart.

Knows how what people wrote goes through a template in disguise. Knows nothing of pictures and of the forms of messages.

Messages, tools and variables are rendered with another character in place of every one that begins a control token:

    what people wrote      see <think>         {"name": "</tool_call>"}
    what a template reads  see \ue000think>         {"name": "\ue000/tool_call>"}

A control token in the rendered text was therefore written by the template, wherever it stands; also one that two parts
of a message would make together. Its text is cut at these and nowhere else, so that the ids of a text that spells no
control token are those of the whole text. Words of its own that a template looks for ("<|think_off|>") stay readable.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.begun import Begun
from mlx_qwen35.text.messages import split_reasoning
from mlx_qwen35.text.template import ChatTemplate
from mlx_qwen35.text.tokenizer import Tokenizer

_DISGUISES = (*range(0xE000, 0xF900), *range(0xF0000, 0xFFFFE))  # for private use; one that nobody used is taken


@dataclass(frozen=True)
class Rendered:
    """text: what the template wrote, and what people wrote in disguise. plain: disguise -> character. continued: what
    the answer goes on with, at the end of the text, as people wrote it."""

    text: str
    plain: Mapping[int, str] = field(default_factory=dict)
    continued: str = ""

    def readable(self) -> str:
        return self.text.translate(self.plain)

    def tokens(self, tokenizer: Tokenizer) -> list[int]:
        """The ids: control tokens where the template wrote them, and characters everywhere else."""
        readable, find = self.readable(), tokenizer.control_pattern.finditer
        written = list(find(self.text))
        if [match.span() for match in written] == [match.span() for match in find(readable)]:
            return tokenizer.encode(readable)
        ids: list[int] = []
        at = 0
        for match in written:
            ids += tokenizer.encode(readable[at : match.start()], plain=True)
            ids.append(tokenizer.control_tokens[match["token"]])
            at = match.end()
        return ids + tokenizer.encode(readable[at:], plain=True)


def render(
    template: ChatTemplate,
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
    add_generation_prompt: bool = True,
    begun: Begun | None = None,
    allow_control_tokens: bool = False,
) -> Rendered:
    """Checked messages, rendered. begun: what there is of the answer, behind the generation prompt.
    allow_control_tokens: without disguise, so that a control token is one whoever wrote it. Raises PromptError as
    `ChatTemplate.render` does."""
    given: dict[str, Any] = {"messages": messages, "tools": tools, **(variables or {})}
    if allow_control_tokens:
        return _with(begun, template.render(**given, add_generation_prompt=add_generation_prompt), {})
    if template.splits_reasoning:
        given["messages"] = split_reasoning(messages)
    try:
        written = None if begun is None else (begun.reasoning, begun.content)
        plain = _disguises([given, written], template, tokenizer)
        if plain:
            disguised, written = _disguised([given, written], plain, _own_words(template, tokenizer))
        else:
            disguised = given
    except RecursionError:
        raise PromptError("the messages or tools are nested too deeply, or hold themselves; make them flat") from None
    try:
        text = template.render(**disguised, add_generation_prompt=add_generation_prompt)
    except PromptError as error:
        raise PromptError(str(error).translate(plain)) from error
    for disguise in plain:
        text = text.replace(_escaped(disguise), chr(disguise))
    if begun is not None and written is not None:
        begun = replace(begun, reasoning=written[0], content=written[1])
    return _with(begun, text, plain)


def _with(begun: Begun | None, text: str, plain: Mapping[int, str]) -> Rendered:
    if begun is None:
        return Rendered(text, plain)
    text, continued = begun.behind(text)
    return Rendered(text, plain, continued.translate(plain))


def _disguises(given: Any, template: ChatTemplate, tokenizer: Tokenizer) -> dict[int, str]:
    """A character that nobody used for each that begins a control token; none where nobody wrote any of those."""
    texts = list(_texts(given))
    signs = {token[0] for token in tokenizer.control_tokens if not (token[0].isalnum() or token[0].isspace())}
    if all(map(signs.isdisjoint, texts)):
        return {}
    texts.append(template.source)
    used = set().union(*texts)
    free = (n for n in _DISGUISES if chr(n) not in used and not any(_escaped(n) in text for text in texts))
    plain = dict(zip(free, sorted(signs), strict=False))
    if len(plain) < len(signs):
        raise PromptError("the messages use every character for private use that there is; leave one out")
    return plain


def _disguised(given: Any, plain: Mapping[int, str], words: Iterable[str]) -> Any:
    """A copy of `given` in which other characters stand for signs, but for those that begin one of `words`."""
    disguise = {sign: chr(n) for n, sign in plain.items()}
    signs = disguise.keys()
    kept = sorted((word for word in words if word[0] in signs and signs.isdisjoint(word[1:])), key=len, reverse=True)
    pattern = re.compile("|".join(map(re.escape, [*kept, *signs])))

    def changed(value: Any) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda match: disguise.get(match[0], match[0]), value)
        if isinstance(value, Mapping):
            return {changed(key): changed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [changed(item) for item in value]
        if _is_atom(value) or signs.isdisjoint(str(value)):
            return value
        return changed(str(value))  # an object that a template could print

    return changed(given)


def _own_words(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """What the template may look for that is no part of a control token."""
    tokens = tokenizer.control_tokens
    return [w for w in template.words if not any(token.startswith(w) or w.startswith(token) for token in tokens)]


def _escaped(disguise: int) -> str:
    """As JSON of ASCII alone has it."""
    return json.dumps(chr(disguise))[1:-1]


def _is_atom(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _texts(item)
    elif not _is_atom(value):
        yield str(value)
