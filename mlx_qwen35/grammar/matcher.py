"""One answer's place in its grammar: what may come next, and what has come.

reasoning    free, but for the end of the turn; only the token </think> ends it, for its letters would end it in the
             eyes of who reads the answer, in the middle of a token
blank        behind </think>: the line ends that the template has there, if the model writes them
form         the grammar's
ended        the turn is over
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy as shallow
from enum import Enum, auto
from typing import TYPE_CHECKING

import numpy as np

from mlx_qwen35.errors import GrammarError
from mlx_qwen35.grammar.vocabulary import SPECIAL, THINK_END, Vocabulary

if TYPE_CHECKING:
    import llguidance

_CLOSING = THINK_END.encode()
_BLANK = 2  # line ends between </think> and the answer
_FOLLOWED = {"NotStopped", "NoExtension", "NoExtensionBias", "EndOfSentence"}


class _Place(Enum):
    REASONING = auto()
    BLANK = auto()
    FORM = auto()
    ENDED = auto()


class Matcher:
    """Made by `Grammar.matcher`. Not for two threads at once; copies are independent."""

    def __init__(self, inner: llguidance.LLMatcher, vocabulary: Vocabulary, *, thinking: bool) -> None:
        self._inner, self._vocabulary = inner, vocabulary
        self._place = _Place.REASONING if thinking else _Place.FORM
        self._begun = thinking  # nothing may open a reasoning any more
        self._tail = b""  # the last bytes of the reasoning
        self._blank = 0
        self._complete: bool | None = False
        self._words: np.ndarray | None = None

    def mask(self) -> np.ndarray | None:
        """uint32 words [ceil(V / 32)], read only: bit i of word w says whether token 32 w + i may come next. None:
        anything may. Raises GrammarError where the grammar cannot be followed any further."""
        if self._words is None:
            self._words = self._made_mask()
            self._words.setflags(write=False)
        return self._words

    def advance(self, token: int) -> None:
        """`token` was chosen. Raises GrammarError if it may not come."""
        if not self._allows(token):
            raise GrammarError(f"token {token} does not fit the form of the answer; choose under the mask")
        self._take(token)

    def accepted(self, tokens: Sequence[int]) -> int:
        """How many of these tokens may come, one after the other; nothing changes."""
        tokens = list(tokens)
        if self._is_forms_own(tokens):
            return self._inner.validate_tokens(tokens)
        other = self.copy()
        for count, token in enumerate(tokens):
            if not other._allows(token):
                return count
            other._take(token)
        return len(tokens)

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end of the turn."""
        return self._place is _Place.ENDED or bool(np.array_equal(self.mask(), self._vocabulary.end))

    @property
    def complete(self) -> bool:
        """Whether the answer could end here and be in the form; once the turn has ended, whether it is."""
        if self._place in (_Place.REASONING, _Place.ENDED):
            return bool(self._complete)
        return self._inner.is_accepting()

    def forced(self) -> list[int]:
        """Tokens of the text that has to follow, as the tokenizer cuts it, but the last, which may go on beyond it.
        The form may allow that it is cut otherwise, or that the turn begins with reasoning."""
        if self._place is not _Place.FORM:
            return []
        data = self._inner.deep_copy().compute_ff_bytes()  # of a copy: afterwards its masks are other ones
        text, *_ = data.split(SPECIAL)
        return self._vocabulary.encode(text.decode(errors="ignore"))[:-1] if len(text) > 1 else []

    def copy(self) -> Matcher:
        other = shallow(self)
        other._inner = self._inner.deep_copy()
        return other

    def _allows(self, token: int) -> bool:
        if not 0 <= token < self._vocabulary.size:
            return False
        if self._words is None and self._is_forms_own((token,)):
            return self._follows(token)  # cheaper than a mask
        return bool(self.mask()[token // 32] >> np.uint32(token % 32) & 1)

    def _take(self, token: int) -> None:
        vocabulary, self._words = self._vocabulary, None
        if self._place is _Place.REASONING:
            if token == vocabulary.closing:
                self._place = _Place.BLANK
            self._tail = (self._tail + vocabulary.token_bytes(token))[1 - len(_CLOSING) :]
            return
        if self._place is _Place.ENDED:
            return
        if token in vocabulary.ends:
            self._complete, self._place = True, _Place.ENDED
            return
        if token == vocabulary.opening and not self._begun and not self._follows(token):
            self._place, self._begun = _Place.REASONING, True
            return
        self._begun = True
        if self._is_blank(token) and not self._follows(token):
            self._blank += vocabulary.blank[token]
            return
        self._place = _Place.FORM
        if not self._inner.consume_token(token):
            raise GrammarError(f"the form of the answer cannot be followed any further: {self._error()}")

    def _is_forms_own(self, tokens: Sequence[int]) -> bool:
        """Whether the form alone says which of these tokens may come."""
        known = self._vocabulary.known
        plain = all(0 <= token < known and token not in self._vocabulary.ends for token in tokens)
        return plain and self._place is _Place.FORM and self._begun

    def _follows(self, token: int) -> bool:
        """Whether a token is the grammar's own."""
        return self._inner.validate_tokens([token]) == 1

    def _is_blank(self, token: int) -> bool:
        if self._place is not _Place.BLANK:
            return False
        return self._blank + self._vocabulary.blank.get(token, _BLANK + 1) <= _BLANK

    def _made_mask(self) -> np.ndarray:
        vocabulary = self._vocabulary
        if self._place is _Place.ENDED:
            return vocabulary.end
        if self._place is _Place.REASONING:
            return self._reasoning_mask()
        words = self._form_mask()
        more = [token for token in vocabulary.blank if self._is_blank(token)]
        if not self._begun and vocabulary.opening is not None and vocabulary.closing is not None:
            more.append(vocabulary.opening)
        if more:
            words = words.copy()
            for token in more:
                words[token // 32] |= np.uint32(1 << token % 32)
        return words

    def _reasoning_mask(self) -> np.ndarray:
        refused: set[int] = set()
        for beginning, tokens in self._vocabulary.spelling.items():
            if self._tail.endswith(beginning):
                refused.update(tokens)
        if not refused:
            return self._vocabulary.free
        words = self._vocabulary.free.copy()
        for token in refused:
            words[token // 32] &= ~np.uint32(1 << token % 32)
        return words

    def _form_mask(self) -> np.ndarray:
        inner = self._inner
        words = np.frombuffer(inner.compute_bitmask(), np.uint32, count=len(self._vocabulary.end))
        # Whatever goes wrong in there, it then allows the end of the turn, as if the answer were whole.
        if inner.is_error() or inner.stop_reason() not in _FOLLOWED or not words.any():
            raise GrammarError(f"the form of the answer cannot be followed any further: {self._error()}")
        if inner.is_stopped() and not inner.is_accepting():
            raise GrammarError("the form of the answer has no end from here on")
        return words

    def _error(self) -> str:
        text = self._inner.get_error() or self._inner.stop_reason()
        return text.strip().splitlines()[0]
