"""Stop strings in streamed text. Knows strings only: no tokens, no reply format."""

from __future__ import annotations

from collections.abc import Iterable

from mlx_qwen35.errors import PromptError


class StopStrings:
    """Lets text through up to the first stop string and never a part of one. Whichever way the text is cut, the same
    is let through: the stop string that is complete first ends the text (of two complete at once, the longer).

    stop: the one that did, None while none has."""

    def __init__(self, stops: str | Iterable[str]):
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(stop, str) and stop for stop in self._stops):
            raise PromptError("a stop string must be a text that is not empty")
        self._held = ""
        self.stop: str | None = None

    def feed(self, text: str) -> tuple[str, bool]:
        """(what may be shown now, whether a stop string has come). After a stop nothing more is shown."""
        if self.stop is not None:
            return "", True
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            end, at = min(found)
            self.stop, self._held = text[at:end], ""
            return text[:at], True
        show = len(text) - max((partial_suffix(text, stop) for stop in self._stops), default=0)
        self._held = text[show:]
        return text[:show], False

    def finish(self) -> str:
        """What was held back, now that nothing follows it."""
        held, self._held = self._held, ""
        return held


def partial_suffix(text: str, word: str) -> int:
    """How many characters at the end of `text` could be the beginning of `word` (fewer than all of it)."""
    for length in range(min(len(text), len(word) - 1), 0, -1):
        if text.endswith(word[:length]):
            return length
    return 0
