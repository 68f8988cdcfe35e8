"""Where an answer is shown while it comes: in a notebook, as text, or nowhere.

Knows parts, displays and how often to redraw them. Knows nothing of how parts are made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from mlx_qwen35.notebook import shell
from mlx_qwen35.notebook.reply import Reply
from mlx_qwen35.notebook.thumbnails import thumbnails
from mlx_qwen35.text.screen import Screen

if TYPE_CHECKING:
    from mlx_qwen35.text.parts import Part
    from mlx_qwen35.vision.media import Media

REDRAW_SECONDS = 0.1
REDRAW_CHARACTERS = 8000  # of this length; a longer answer is redrawn less often in proportion
PLACES = ("auto", "rich", "text", "off")


class View(Protocol):
    """One answer."""

    def progress(self, done: int, total: int) -> None:
        """So many tokens of the prompt are read."""

    def show(self, part: Part) -> None: ...

    def end(self, reply: Reply | None) -> None:
        """reply: all of it; None where there is none."""


def open_view(place: str, media: Sequence[Media]) -> View:
    """place: "auto" is "rich" in a notebook, "text" in any other IPython and "off" outside of one."""
    if place == "auto":
        place = "rich" if shell.is_rich() else "text" if shell.running() is not None else "off"
    return {"rich": RichView, "text": TextView, "off": NoView}[place](media)


class NoView:
    def __init__(self, media: Sequence[Media]) -> None:
        pass

    def progress(self, done: int, total: int) -> None:
        pass

    def show(self, part: Part) -> None:
        pass

    def end(self, reply: Reply | None) -> None:
        pass


class TextView(NoView):
    """On standard output, as in `mlx-qwen35 chat`."""

    def __init__(self, media: Sequence[Media]) -> None:
        self._screen = Screen()

    def show(self, part: Part) -> None:
        self._screen.show(part)

    def end(self, reply: Reply | None) -> None:
        self._screen.end()
        if reply is not None and reply.cut:
            print(f"({reply.cut})")


class RichView:
    """Markdown in one display that is drawn again and again; what the question shows stands above it, drawn once."""

    def __init__(self, media: Sequence[Media]) -> None:
        if media:
            kinds = ", ".join(medium.kind for medium in media)
            shell.show({"text/plain": f"[{kinds}]", "text/markdown": thumbnails(media)})
        self._handle = shell.show({"text/plain": "", "text/markdown": ""}, updatable=True)
        self._parts: list[Part] = []
        self._length = 0
        self._drawn = 0.0

    def progress(self, done: int, total: int) -> None:
        if 0 < done < total and self._due():
            self._draw(f"Reading the prompt: {done:,} of {total:,} tokens")

    def show(self, part: Part) -> None:
        self._parts.append(part)
        self._length += len(part.text)
        if self._due():
            so_far = Reply.from_parts(self._parts)
            thinking = bool(so_far.reasoning) and not so_far.text and not so_far.tool_calls
            going_on = Reply(so_far.text, so_far.reasoning, so_far.tool_calls)
            self._draw(going_on.markdown(thinking=thinking), so_far.plain())

    def end(self, reply: Reply | None) -> None:
        self._draw("" if reply is None else reply.markdown(), "" if reply is None else reply.plain())

    def _due(self) -> bool:
        wait = REDRAW_SECONDS * max(1.0, self._length / REDRAW_CHARACTERS)
        return time.perf_counter() - self._drawn >= wait

    def _draw(self, markdown: str, text: str = "") -> None:
        shell.update(self._handle, {"text/plain": text, "text/markdown": markdown})
        self._drawn = time.perf_counter()
