"""What a caller asks of thinking, as the variables of one checkpoint's chat template.

Knows the words that clients send for an effort, and finds out from the template which of them it takes. Knows nothing
of messages and tokens.

Qwen3.5 and 3.6 know `enable_thinking`; 3.6 and 3.8 `preserve_thinking`; 3.8 `reasoning_effort`, of which it takes xhigh
(its default), medium and low and refuses the others; the 2.4T refuses enable_thinking=False.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from functools import cached_property, lru_cache
from typing import Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.template import ChatTemplate

EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")
_WORK = EFFORTS[1:]  # the words that leave thinking on, from the least to the most
_RESERVED = ("messages", "tools", "add_generation_prompt")
_SWITCHES = ("enable_thinking", "preserve_thinking")
_UNHEARD = "qwopqwop"  # an effort that no template knows
_CHAT = [{"role": "user", "content": "Hello"}]


class TemplateVariables:
    """The variables of one template, which is asked what it knows when that is first needed: by a short chat."""

    def __init__(self, template: ChatTemplate):
        self.template = template

    def of(
        self,
        *,
        enable_thinking: bool | None = None,
        reasoning_effort: str | None = None,
        preserve_thinking: bool | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """What the template is rendered with, besides messages and tools; what is None is left to the template.

        reasoning_effort: one of EFFORTS. "none" switches thinking off; the others leave it on, and become the nearest
        that the template knows, or nothing where it knows no efforts. chat_template_kwargs: any variables; those with
        a name above mean the same, and an effort that only the template knows is passed on. Names that the template
        does not read change nothing.

        Raises PromptError for words and values that are none, for two values that contradict each other, for thinking
        that cannot be switched off, and for a variable that the messages make.
        """
        given = {"enable_thinking": enable_thinking, "preserve_thinking": preserve_thinking}
        variables = _merged({k: v for k, v in given.items() if v is not None}, self._checked(chat_template_kwargs))
        for name in _SWITCHES:
            if not isinstance(variables.get(name, True), bool):
                raise PromptError(f"{name} is {variables[name]!r}; give True or False")
        own = variables.pop("reasoning_effort", None)
        effort = check_effort(reasoning_effort)
        if own is not None:
            word = own.strip().lower() if isinstance(own, str) else own
            if effort is not None and word != effort:
                raise PromptError(
                    f"reasoning_effort={reasoning_effort!r} and chat_template_kwargs['reasoning_effort']={own!r} "
                    "contradict each other; give one"
                )
            if word not in EFFORTS:
                return {**variables, "reasoning_effort": own}
            effort = word
        if effort is None:
            return variables
        if "enable_thinking" in variables and variables["enable_thinking"] is (effort == "none"):
            raise PromptError(
                f"reasoning_effort={effort!r} and enable_thinking={variables['enable_thinking']} contradict each "
                "other; give one"
            )
        return variables | (self._without_thinking if effort == "none" else self._with_effort(effort))

    def _checked(self, kwargs: Any) -> dict[str, Any]:
        if kwargs is None:
            return {}
        if not isinstance(kwargs, Mapping) or not all(isinstance(name, str) for name in kwargs):
            raise PromptError(
                f"chat_template_kwargs is of type {type(kwargs).__name__}; write a dict of the template's variables, "
                'such as {"enable_thinking": false}'
            )
        known = sorted(self.template.variables - {*_RESERVED})
        for name in kwargs:
            if name in _RESERVED:
                raise PromptError(f"chat_template_kwargs cannot hold {name!r}, which the prompt makes; leave it out")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.85)
            if near and name not in (*known, *_SWITCHES, "reasoning_effort"):
                raise PromptError(f"chat_template_kwargs holds {name!r}; this chat template knows {near[0]!r}")
        return {name: value for name, value in kwargs.items() if value is not None or name not in _SWITCHES}

    def _render(self, **variables: Any) -> str | PromptError:
        try:
            return self.template.render(_CHAT, **variables)
        except PromptError as error:
            return error

    @cached_property
    def _without_thinking(self) -> dict[str, Any]:
        """What switches thinking off."""
        if "enable_thinking" in self.template.variables:
            refusal = self._render(enable_thinking=False)
            if isinstance(refusal, PromptError):
                raise PromptError(
                    f"reasoning_effort='none' turns thinking off, which this checkpoint does not support "
                    f"({refusal}); ask for {self._least()!r}"
                )
            return {"enable_thinking": False}
        if "none" in self._known:
            return {"reasoning_effort": "none"}
        if str(self._render()).rstrip().endswith("<think>"):
            raise PromptError(
                "reasoning_effort='none' asks for no thinking, and this checkpoint's chat template cannot switch it "
                "off; leave it out"
            )
        return {}

    def _least(self) -> str:
        return next((word for word in _WORK if word in self._known), _WORK[0])

    def _with_effort(self, effort: str) -> dict[str, Any]:
        """The effort as the template's own word: itself, or the nearest. Of two equally near the greater: "high" on
        Qwen3.8 is its default xhigh, since medium there is the model without a word about effort, not a step below."""
        places = {_WORK.index(word): word for word in self._known if word in _WORK}
        if not places:
            return {}
        at = _WORK.index(effort)
        return {"reasoning_effort": places[min(places, key=lambda place: (abs(place - at), -place))]}

    @cached_property
    def _known(self) -> frozenset[str]:
        """The words of EFFORTS that the template takes; none if it knows no efforts."""
        if "reasoning_effort" not in self.template.variables:
            return frozenset()
        made = {word: self._render(reasoning_effort=word) for word in EFFORTS}
        unheard = self._render(reasoning_effort=_UNHEARD)
        if isinstance(unheard, PromptError):
            return frozenset(word for word, text in made.items() if isinstance(text, str))
        # It takes any word, and tells some from all others. What lies between those is its plain course.
        told = [EFFORTS.index(w) for w, text in made.items() if isinstance(text, str) and text != unheard]
        return frozenset(EFFORTS[min(told) : max(told) + 1]) if told else frozenset()


@lru_cache(maxsize=8)
def variables_of(template: ChatTemplate) -> TemplateVariables:
    """The same object for the same template, so that it is asked once."""
    return TemplateVariables(template)


def check_effort(value: Any) -> str | None:
    """The word as EFFORTS has it; raises PromptError where that has no such word."""
    if value is None:
        return None
    word = value.strip().lower() if isinstance(value, str) else None
    if word not in EFFORTS:
        raise PromptError(f"reasoning_effort is {value!r}; it is one of {', '.join(EFFORTS)}")
    return word


def _merged(named: dict[str, Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Both; what was said twice has to be the same."""
    for name in named.keys() & kwargs.keys():
        if named[name] != kwargs[name]:
            raise PromptError(
                f"{name}={named[name]!r} and chat_template_kwargs[{name!r}]={kwargs[name]!r} contradict each other; "
                "give one"
            )
    return named | kwargs
