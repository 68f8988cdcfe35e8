"""A grammar, compiled once: what was asked of an answer, for all who answer by it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlx_qwen35.errors import ArgumentError, GrammarError
from mlx_qwen35.grammar import vocabulary as vocabularies
from mlx_qwen35.grammar.calls import calls
from mlx_qwen35.grammar.forms import form
from mlx_qwen35.grammar.matcher import Matcher
from mlx_qwen35.grammar.vocabulary import Vocabulary

if TYPE_CHECKING:
    import llguidance

_MOST_ITEMS = 1_000_000  # of work in one mask: 20 times as many as otherwise, for grammars of single characters
_KEPT = 16  # of a vocabulary: with forty tools one takes 0.2 s, and every turn of a chat asks for the same


class Grammar:
    """Made by `Grammar.of`. Any number of requests, on any threads, can have matchers of it."""

    def __init__(self, start: llguidance.LLMatcher, vocabulary: Vocabulary) -> None:
        self._start, self._vocabulary = start, vocabulary

    @classmethod
    def of(
        cls,
        processor: Any,
        *,
        response_format: Any = None,
        tools: Sequence[Mapping[str, Any]] | None = (),
        tool_choice: Any = "auto",
        strict: bool = False,
    ) -> Grammar | None:
        """The grammar of what is asked; None where nothing is.

        response_format: a JSON schema, a pydantic model, "json" (an object), a compiled regular expression, OpenAI's
        objects, or {"type": "regex" | "grammar" | "gbnf", ...}. tool_choice: "auto", "none", "required" (one call or
        more), a tool's name, or OpenAI's object. strict: calls fit their tools' schemas also where none is asked for.
        Raises ArgumentError, before anything is computed, naming what cannot be followed and where it stands.
        """
        shape, control = form(response_format), processor.tokenizer.control_tokens
        text = calls(tools or (), tool_choice, strict=strict, control=control, form=shape)
        return None if text is None else cls._compiled(text, vocabularies.vocabulary(processor))

    @staticmethod
    def prepare(processor: Any) -> None:
        """Begins, on a thread, what the first grammar of a processor would wait for: about 2 s for the published
        vocabulary. It may be called at any time."""
        vocabularies.prepare(processor)

    def matcher(self, *, thinking: bool) -> Matcher:
        """The place before an answer. thinking: the prompt ends inside <think>: free until </think>. Raises
        ArgumentError if this tokenizer has no token for that."""
        if thinking and self._vocabulary.closing is None:
            raise ArgumentError("this tokenizer has no token </think>: a form cannot begin there; turn thinking off")
        return Matcher(self._start.deep_copy(), self._vocabulary, thinking=thinking)

    @classmethod
    def _compiled(cls, text: str, vocabulary: Vocabulary) -> Grammar:
        import llguidance

        known = vocabulary.grammars.get(text)
        if known is not None:
            return known
        limits = llguidance.LLParserLimits(verbose_errors=False, step_max_items=_MOST_ITEMS)
        start = llguidance.LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
        if start.is_error():
            raise ArgumentError(f"the form of the answer cannot be followed: {_sentence(start.get_error())}")
        grammar = cls(start, vocabulary)
        try:
            grammar.matcher(thinking=False).mask()
        except GrammarError:
            raise ArgumentError(
                "no answer has the form that is asked for: it refers to itself or forbids all"
            ) from None
        while len(vocabulary.grammars) >= _KEPT:
            vocabulary.grammars.pop(next(iter(vocabulary.grammars), ""), None)
        vocabulary.grammars[text] = grammar
        return grammar


def _sentence(error: str) -> str:
    lines = [line.strip() for line in error.strip().splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else "no reason is given"
