"""What arguments may be: each check raises one ArgumentError that names the argument, what was given and what to give.

Knows values and names. Knows nothing of what they are for.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

from mlx_qwen35.errors import ArgumentError

_SHOWN = 60  # characters of a value that an error shows
_LIKE = 0.75  # how alike, of 1, a name and what it may have meant are; "verbose" and "videos" are 0.62


def shown(value: Any) -> str:
    """A value as an error shows it: what it is, and its beginning."""
    text = repr(value)
    text = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
    return text if value is None or isinstance(value, bool) else f"{text}, of type {type(value).__name__}"


def whole(name: str, value: Any, least: int, most: int | None = None, *, otherwise: str | None = None) -> None:
    """A whole number from `least` to `most`. otherwise: what None does; None: it may not be None."""
    if value is None and otherwise is not None:
        return
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    rest = "" if otherwise is None else f", or None {otherwise}"
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentError(f"{name} is {shown(value)}; give a whole number, {limits}{rest}")
    if value < least or (most is not None and value > most):
        raise ArgumentError(f"{name} is {value}; it must be {limits}{rest}")


def number(name: str, value: Any) -> None:
    """A number that is finite."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentError(f"{name} is {shown(value)}; give a number")
    if not math.isfinite(value):
        raise ArgumentError(f"{name} is {value}; give a finite number")


def flag(name: str, value: Any, *, otherwise: str | None = None) -> None:
    """True or False. otherwise: as in `whole`."""
    if not isinstance(value, bool) and not (value is None and otherwise is not None):
        rest = "" if otherwise is None else f", or None {otherwise}"
        raise ArgumentError(f"{name} is {shown(value)}; give True or False{rest}")


def text(name: str, value: Any, *, optional: bool = False) -> None:
    if not isinstance(value, str) and not (value is None and optional):
        raise ArgumentError(f"{name} is {shown(value)}; give a text")


def path(name: str, value: Any, *, optional: bool = False) -> None:
    """A text or a Path that is not empty."""
    given = isinstance(value, (str, os.PathLike)) and str(value).strip()
    if not given and not (value is None and optional):
        raise ArgumentError(f"{name} is {shown(value)}; give a text or a Path")


def mapping(name: str, value: Any) -> None:
    """A dict with names for keys, or None."""
    if value is not None and not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
        raise ArgumentError(f"{name} is {shown(value)}; give a dict of names and values")


def some(name: str, value: Any, of: str) -> None:
    """A list or another sequence, but no text."""
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        raise ArgumentError(f"{name} is {shown(value)}; give a list of {of}, also for a single one")


def called(name: str, value: Any) -> None:
    """What can be called, or None."""
    if value is not None and not callable(value):
        raise ArgumentError(f"{name} is {shown(value)}; give a function, or None")


def suggestion(name: str, known: Iterable[str]) -> str:
    """What a name that there is not may have meant: a question for the end of an error, or ''."""
    found = meant(name, known)
    return f"; did you mean {found}?" if found else ""


def meant(name: str, known: Iterable[str]) -> str | None:
    """The name that a wrong one is most like; None: it is like none."""
    known = list(known)
    longer = [other for other in known if len(name) > 2 and other.startswith(name)]
    return next(iter(longer or get_close_matches(name, known, n=1, cutoff=_LIKE)), None)


def model_and_processor(owner: str, model: Any, processor: Any, *, optional: bool = False) -> None:
    """What `load` returns, each in its place. owner: what takes them. optional: the processor may be None."""
    pair(owner, model)
    if _is_processor(model) and not is_model(model):
        raise ArgumentError(f"{owner}: the model comes first, then the processor: {owner}(model, processor, ...)")
    if not is_model(model):
        raise ArgumentError(f"{owner}: model is {shown(model)}; give the model that load returns")
    if not _is_processor(processor) and not (processor is None and optional):
        raise ArgumentError(f"{owner}: processor is {shown(processor)}; give the processor that load returns")


def pair(owner: str, model: Any) -> None:
    """Refuses what `load` returns, where it is given as it is."""
    if isinstance(model, (tuple, list)):
        raise ArgumentError(f"{owner}: model is a {type(model).__name__}; load gives two: model, processor = load(...)")


def is_model(value: Any) -> bool:
    return hasattr(value, "make_cache") and hasattr(value, "hidden")


def _is_processor(value: Any) -> bool:
    return hasattr(value, "prompt") and hasattr(value, "tokenizer")
