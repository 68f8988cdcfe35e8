"""The tokens that stand for pictures and videos in a prompt's text: one from the template becomes as many as are due.

Knows how placeholders are spelled and how the times of a video are written between them. Knows nothing of ids, pixels
or messages; that people spelled none in the texts it gets is the business of text/rendering.py.

    image       <|vision_start|><|image_pad|><|vision_end|>
            ->  <|vision_start|><|image_pad|><|image_pad|>...<|vision_end|>
    video       <|vision_start|><|video_pad|><|vision_end|>
            ->  <0.2 seconds><|vision_start|><|video_pad|>...<|vision_end|><1.2 seconds><|vision_start|>...

So the models were released (transformers up to 5.5, vLLM); transformers from 5.12 on leaves the template's pair of
markers around all frames of a video.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mlx_qwen35.errors import PromptError


class Shown(Protocol):
    """What placeholders need of a Media: its kind, "image" or "video", its grid (frame pairs, rows, columns), how many
    tokens it fills, and the seconds of its frame pairs."""

    @property
    def kind(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...
    @property
    def tokens(self) -> int: ...
    @property
    def timestamps(self) -> tuple[float, ...]: ...


@dataclass(frozen=True)
class Placeholders:
    """How a checkpoint spells them."""

    image: str
    video: str
    start: str
    end: str

    def check(self, text: str, kinds: Sequence[str]) -> None:
        """Raises PromptError if the placeholders that the template wrote are not one for each of `kinds`, in order."""
        found = ["image" if self.image in match[0] else "video" for match in self._pattern.finditer(text)]
        if found != list(kinds):
            raise PromptError(
                f"the messages show {_counted(kinds)}, and the chat template made placeholders for {_counted(found)}; "
                f"use the template that came with the model, and with allow_control_tokens let no text hold "
                f"{self.image} or {self.video}"
            )

    def expanded(self, text: str, media: Sequence[Shown]) -> str:
        """The text with the placeholders of `media`, which are in its order."""
        left = iter(media)
        return self._pattern.sub(lambda match: self._expanded(next(left), match[0]), text)

    def _expanded(self, shown: Shown, short: str) -> str:
        if shown.kind == "image":
            return short.replace(self.image, self.image * shown.tokens)
        pairs = shown.grid[0]
        if len(shown.timestamps) != pairs:
            raise PromptError(f"a video of {pairs} frame pairs has no times; give its Media one timestamp for each")
        frame = self.start + self.video * (shown.tokens // pairs) + self.end
        return "".join(f"<{seconds:.1f} seconds>{frame}" for seconds in shown.timestamps)

    @property
    def _pattern(self) -> re.Pattern[str]:
        image, video, start, end = map(re.escape, (self.image, self.video, self.start, self.end))
        return re.compile(f"{image}|{start}{video}{end}|{video}")


def _counted(kinds: Sequence[str]) -> str:
    counts = [f"{list(kinds).count(kind)} {kind}s" for kind in ("image", "video")]
    return " and ".join(counts)
