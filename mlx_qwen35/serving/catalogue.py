"""Which models there are and which of them are loaded, as the interfaces ask for it; and the questions that are no
answer of a model: lists, loading, unloading.

Knows what a model looks like from outside. Knows neither how one is loaded nor any interface.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from mlx_qwen35.serving.refusal import Refusal

if TYPE_CHECKING:
    from mlx_qwen35.library.listing import LocalModel
    from mlx_qwen35.serving.exchange import Ask

State = Literal["not-loaded", "loading", "loaded"]


@dataclass(frozen=True)
class Listed:
    """A model and where it is now. name: to ask for it by, and no other has it; stored: what lies on the disk.

    Of one that is not loaded the rest is None or 0. since: when it was loaded, seconds since 1970; used: when it last
    answered; ttl: idle seconds that it stays, math.inf for ever; busy: answers that are being made; context_length:
    tokens of the longest conversation; nbytes: of its weights in memory; parallel: answers that are made at once.
    """

    name: str
    stored: LocalModel
    state: State = "not-loaded"
    since: float | None = None
    used: float | None = None
    ttl: float | None = None
    busy: int = 0
    context_length: int | None = None
    nbytes: int = 0
    parallel: int = 0

    @property
    def loaded(self) -> bool:
        return self.state == "loaded"

    @property
    def size(self) -> str | None:
        """Its parameters in words, such as "35.1B"."""
        count = self.stored.parameters
        if not count:
            return None
        return f"{count / 1e9:.3g}B" if count >= 1e9 else f"{count / 1e6:.3g}M"


class Catalogue(Protocol):
    """The models of a server. All of it is called on the server's event loop."""

    def models(self) -> Sequence[Listed]:
        """All that can be asked for, in a steady order; those that cannot be loaded are not among them. It may be asked
        for often: it reads no disk."""

    async def load(self, name: str, ttl: float | None = None, context_length: int | None = None) -> Listed:
        """Loads it, or waits until it is; one that is loaded gets the new ttl. ttl: as `Listed` has it; None: the
        server's own. Raises Refusal: not_found, unavailable, too_large."""

    async def unload(self, name: str) -> None:
        """Lets its answers end, then gives its memory back; no error where it is not loaded. Raises Refusal not_found
        where there is none of that name."""

    async def count(self, ask: Ask) -> int:
        """Tokens of the prompt of what is asked; nothing is computed, and no weights are loaded. Raises Refusal."""


@dataclass(frozen=True)
class Question:
    """A route that no model answers. path: as Starlette has it, such as /api/v0/models/{name:path}; answer: body (an
    empty one where the method has none) and what stands in the path -> the JSON of the answer; may raise Refusal.
    refused: the JSON of an error."""

    method: Literal["GET", "POST", "DELETE", "HEAD"]
    path: str
    answer: Callable[[Mapping[str, Any], Mapping[str, str]], Awaitable[Any]]
    refused: Callable[[Refusal], dict[str, Any]]


def found(catalogue: Catalogue, name: str) -> Listed:
    """The model of that name, whatever its case, with or without a tag ":latest" behind it; where the last part of the
    name fits just one, without its publisher. Raises Refusal not_found, which lists what there is."""
    models = catalogue.models()
    wanted = without_tag(name).lower()
    exact = [each for each in models if each.name.lower() == wanted]
    if not exact and "/" not in wanted:
        exact = [each for each in models if each.name.lower().rpartition("/")[2] == wanted]
    if len(exact) != 1:
        raise not_found(name, models)
    return exact[0]


def without_tag(name: str) -> str:
    """A name as Ollama's clients write it, without ":latest"."""
    return name.strip().removesuffix(":latest")


def not_found(name: str, models: Sequence[Listed]) -> Refusal:
    """The error for a model that there is not, with at most ten of those that there are."""
    names = [each.name for each in models[:10]]
    here = f"here are {', '.join(names)}" if names else "there is none here"
    more = f" and {len(models) - 10} more" if len(models) > 10 else ""
    shown = name if len(name) <= 80 else name[:77] + "..."
    return Refusal("not_found", f"model {shown!r} is not on this machine: {here}{more}", "model")
