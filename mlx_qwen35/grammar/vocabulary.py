"""A processor's tokens as llguidance wants them: made once, shared by all requests, on a thread where there is time.

Added tokens are marked as such, so that no text spells one: what a schema's words spell comes out as the ordinary
tokens of its characters, and an added token comes only where a grammar names it by its id. llguidance is never asked
to choose a tokenization itself (`no_forcing`): it would take that of the whole text, and refuse it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np

from mlx_qwen35.errors import ArgumentError

if TYPE_CHECKING:
    import llguidance

SPECIAL = b"\xff"  # llguidance's mark in front of a token that is no text
THINK_END = "</think>"
# Sets of tokens that are allowed at once where a whole set is: for strings of JSON, as llguidance has them, and for
# text that no tag begins in (regex.without).
_PLAIN = r'"\\\x00-\x1f\x7f'
_SETS = [r"[\x20\n\r\t]+", *(f"[^{_PLAIN}]{most}" for most in ("{1,10}", "{1,30}", "+"))]
_SETS += [f"[^<pft/{_PLAIN}][^<{_PLAIN}]*", "[^<pft/][^<]*", "[^<]+"]


@dataclass(frozen=True)
class Vocabulary:
    """tokenizer: llguidance's. size: rows of the head. ends: the ids that end a turn. control: those of added tokens.
    blank: the number of line ends by the id of the token that is one or two of them. token_bytes: the tokenizer's; it
    has `known` ids. encode: a text without control tokens -> its tokens. grammars: the last ones that were compiled, by
    their text (compiled.py keeps them).

    Of masks (uint32 [ceil(size / 32)], read only): free, all tokens but those that end a turn; end, those alone.
    spelling: by a beginning of "</think>", the ids of the tokens that would spell the rest of it.
    """

    tokenizer: llguidance.LLTokenizer
    size: int
    known: int
    ends: frozenset[int]
    control: dict[str, int]
    blank: dict[int, int]
    free: np.ndarray
    end: np.ndarray
    spelling: dict[bytes, tuple[int, ...]]
    token_bytes: Callable[[int], bytes]
    encode: Callable[[str], list[int]]
    grammars: dict[str, Any] = field(default_factory=dict)

    @property
    def opening(self) -> int | None:
        return self.control.get("<think>")

    @property
    def closing(self) -> int | None:
        return self.control.get(THINK_END)


class _Tokens:
    """The face that llguidance asks for tokens."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokens: list[bytes], special: list[int], end: int) -> None:
        self.tokens, self.special_token_ids, self.eos_token_id = tokens, special, end

    def __call__(self, text: str) -> list[int]:
        raise NotImplementedError("no grammar here asks for a tokenization")


_made: WeakKeyDictionary[Any, Future[Vocabulary]] = WeakKeyDictionary()
_lock = threading.Lock()


def prepare(processor: Any) -> None:
    """Begins to make the vocabulary of a processor, on a thread of its own."""
    _future(processor, own_thread=True)


def vocabulary(processor: Any) -> Vocabulary:
    """The vocabulary of a processor; waits until it is made. Raises ArgumentError where llguidance is not installed."""
    return _future(processor, own_thread=False).result()


def _future(processor: Any, *, own_thread: bool) -> Future[Vocabulary]:
    with _lock:
        future = _made.get(processor)
        if future is not None and not (future.done() and future.exception()):
            return future
        future = _made[processor] = Future()
    size, tokenizer, ends = processor.config.text.vocab_size, processor.tokenizer, processor.eos_token_ids

    def make() -> None:
        try:
            future.set_result(_make(tokenizer, ends, size))
        except BaseException as error:
            future.set_exception(error)

    if own_thread:
        threading.Thread(target=make, name="mlx-qwen35-vocabulary", daemon=True).start()
    else:
        make()
    return future


def _make(tokenizer: Any, ends: frozenset[int], size: int) -> Vocabulary:
    try:
        import llguidance
    except ImportError:
        raise ArgumentError("answers in a form need the package llguidance: pip install llguidance") from None
    control = tokenizer.control_tokens
    tokens = [tokenizer.token_bytes(token) for token in range(tokenizer.vocab_size)]
    special = sorted(control.values())
    # A token without bytes is never allowed: so are the head's rows beyond the tokenizer's.
    shown = [*tokens, *(b"" for _ in range(size - len(tokens)))]
    for token in special:
        shown[token] = SPECIAL + shown[token]
    face = _Tokens(shown, special, min(ends))
    known = llguidance.LLTokenizer(face, eos_token=sorted(ends), slices=_SETS)
    face.tokens = []  # they are in its trie now, and the face lives as long as it does
    end = np.zeros(size, bool)
    end[sorted(ends)] = True
    free = np.zeros(size, bool)
    free[[token for token, data in enumerate(tokens) if data]] = True
    closing = THINK_END.encode()
    return Vocabulary(
        tokenizer=known,
        size=size,
        known=len(tokens),
        ends=ends,
        control=control,
        blank={token: len(data) for token, data in enumerate(tokens) if data in (b"\n", b"\n\n")},
        free=_words(free & ~end),
        end=_words(end),
        spelling=_spelling(tokens, closing, frozenset(special)),
        token_bytes=tokenizer.token_bytes,
        encode=lambda text: tokenizer.encode(text, plain=True),
    )


def _spelling(tokens: list[bytes], text: bytes, special: frozenset[int]) -> dict[bytes, tuple[int, ...]]:
    last = text[-1:]
    able = [(token, data) for token, data in enumerate(tokens) if last in data and token not in special]
    return {text[:at]: tuple(token for token, data in able if data.startswith(text[at:])) for at in range(1, len(text))}


def _words(allowed: np.ndarray) -> np.ndarray:
    """bool [V] -> uint32 [ceil(V / 32)]"""
    filled = np.zeros(-(-len(allowed) // 32) * 32, bool)
    filled[: len(allowed)] = allowed
    words = np.packbits(filled, bitorder="little").view("<u4").astype(np.uint32)
    words.setflags(write=False)
    return words
