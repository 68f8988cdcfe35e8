"""Conversations with pictures and videos, for prompts: named ones, and random ones drawn from a seed.

Knows messages in transformers' form, and other forms that mean the same; pictures and videos are noise from a seed, so
nothing binary is stored. Knows no tokens, and neither transformers nor this package.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

Message = dict[str, Any]

TOOL = {
    "type": "function",
    "function": {
        "name": "crop",
        "description": "Cut a part out of the picture.",
        "parameters": {"type": "object", "properties": {"side": {"type": "string"}}, "required": ["side"]},
    },
}


@dataclass(frozen=True)
class Shown:
    """A picture (frames 0), a list of frames, or, with a `rate`, a video file of so many frames a second."""

    height: int
    width: int
    frames: int = 0
    rate: str | None = None
    seed: int = 0

    @property
    def kind(self) -> str:
        return "video" if self.frames else "image"

    def drawn(self, folder: Path) -> Any:
        """A PIL image, a list of them, or the path of a file written into `folder`."""
        if self.rate is not None:
            return str(_video_file(self, folder))
        pictures = [_noise(self.seed + 1000 * n, self.height, self.width) for n in range(self.frames or 1)]
        return pictures if self.frames else pictures[0]


@cache
def _noise(seed: int, height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def _video_file(shown: Shown, folder: Path) -> Path:
    import av

    path = folder / f"{shown.seed}-{shown.frames}-{shown.height}x{shown.width}-{shown.rate.replace('/', '_')}.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=Fraction(shown.rate))
        stream.width, stream.height, stream.pix_fmt = shown.width, shown.height, "yuv420p"
        for picture in replace(shown, rate=None).drawn(folder):
            file.mux(stream.encode(av.VideoFrame.from_image(picture)))
        file.mux(stream.encode())
    return path


@dataclass(frozen=True)
class Conversation:
    """messages: in transformers' form, with a Shown where a picture or a video is; options: of Processor.prompt."""

    messages: tuple[Message, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def shown(self) -> list[Shown]:
        """In the order of the prompt."""
        return [part[part["type"]] for _, part in self._parts() if part["type"] != "text"]

    @property
    def needs_av(self) -> bool:
        return any(shown.rate is not None for shown in self.shown)

    def drawn(self, folder: Path) -> list[Message]:
        """The messages as transformers takes them."""
        return self._replaced(lambda shown: {"type": shown.kind, shown.kind: shown.drawn(folder)})

    def forms(self, folder: Path) -> Iterator[tuple[str, Any, dict[str, Any]]]:
        """Ways to ask the same: name, prompt, the arguments `images` and `videos`."""
        yield "transformers", self.drawn(folder), {}
        if not self.shown:
            return
        number = iter(range(1000))
        yield "places", self._replaced(lambda shown: _by_place(shown, folder, next(number))), {}
        yield "OpenAI", self._replaced(lambda shown: _openai(shown, folder, "{}_url")), {}
        yield "OpenAI input", self._replaced(lambda shown: _openai(shown, folder, "input_{}")), {}
        apart = {f"{kind}s": [s.drawn(folder) for s in self.shown if s.kind == kind] for kind in ("image", "video")}
        yield "apart", self._replaced(lambda shown: {"type": shown.kind}), apart
        if (messages := self._without_media()) is not None:
            yield "beside", messages, apart

    def _parts(self) -> Iterator[tuple[int, Message]]:
        for number, message in enumerate(self.messages):
            for part in message.get("content") if isinstance(message.get("content"), list) else []:
                yield number, part

    def _replaced(self, form: Any) -> list[Message]:
        messages = []
        for message in self.messages:
            content = message.get("content")
            if isinstance(content, list):
                content = [form(p[p["type"]]) if p["type"] != "text" else dict(p) for p in content]
                message = {**message, "content": content}
            messages.append(message)
        return messages

    def _without_media(self) -> Any:
        """The text alone, where its media can be given beside it: all in the last message of the user, images first,
        then one text. A lone question is a string."""
        users = [n for n, message in enumerate(self.messages) if message["role"] == "user"]
        parts = [*self._parts()]
        own = [part for number, part in parts if number == users[-1]]
        kinds = [part["type"] for part in own]
        if {number for number, part in parts if part["type"] != "text"} != {users[-1]}:
            return None
        if kinds[-1] != "text" or kinds[:-1] != sorted(kinds[:-1]) or "text" in kinds[:-1]:
            return None
        text = own[-1]["text"]
        if len(self.messages) == 1:
            return text
        return [{**m, "content": text} if n == users[-1] else m for n, m in enumerate(self.messages)]


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _data_url(shown: Shown, folder: Path) -> str:
    kind, data = "image/png", b""
    if shown.rate is not None:
        kind, data = "video/mp4", Path(shown.drawn(folder)).read_bytes()
    else:
        data = _png(shown.drawn(folder))
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def _by_place(shown: Shown, folder: Path, number: int) -> Message:
    """A path, a URL or base64 where there can be one: frames are none of them."""
    source = shown.drawn(folder)
    if shown.kind == "video" and shown.rate is None:
        return {"type": "video", "video": np.stack([np.asarray(frame) for frame in source])}
    if shown.kind == "image":
        path = folder / f"{number}.png"
        path.write_bytes(_png(source))
        source = str(path)
    name = ("path", "url", "base64", shown.kind)[number % 4]
    if name == "base64":
        source = base64.b64encode(Path(source).read_bytes()).decode()
    elif name == "url":
        source = Path(source).as_uri() if number % 8 < 4 else _data_url(shown, folder)
    return {"type": shown.kind, name: source}


def _openai(shown: Shown, folder: Path, kind: str) -> Message:
    """{"type": "image_url", "image_url": {"url": ...}} or {"type": "input_image", "image_url": ...}"""
    if shown.kind == "video" and shown.rate is None:
        return {"type": "video", "video": shown.drawn(folder)}
    url = _data_url(shown, folder)
    part = kind.format(shown.kind)
    return {"type": part, f"{shown.kind}_url": {"url": url} if part.endswith("_url") else url}


def user(*content: str | Shown, role: str = "user") -> Message:
    if len(content) == 1 and isinstance(content[0], str):
        return {"role": role, "content": content[0]}
    parts = [{"type": "text", "text": c} if isinstance(c, str) else {"type": c.kind, c.kind: c} for c in content]
    return {"role": role, "content": parts}


def said(text: str, **more: Any) -> Message:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> Message:
    return {"role": "system", "content": text}


def called(side: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "crop", "arguments": {"side": side}}}


def _of(*messages: Message, **options: Any) -> Conversation:
    return Conversation(messages, options)


def _named() -> dict[str, Conversation]:
    seeds = iter(range(10_000))

    def image(height: int = 96, width: int = 96) -> Shown:
        return Shown(height, width, seed=next(seeds))

    def frames(count: int = 4, height: int = 64, width: int = 64) -> Shown:
        return Shown(height, width, count, seed=next(seeds))

    def file(count: int, rate: str, height: int = 64, width: int = 96) -> Shown:
        return Shown(height, width, count, rate, seed=next(seeds))

    twice = image(80, 112)
    return {
        # One picture
        "image, text": _of(user(image(), "What is in the picture?")),
        "text, image": _of(user("What is this?", image(96, 128))),
        "text, image, text": _of(user("Here: ", image(128, 64), " what is it?")),
        "image alone": _of(user(image(70, 100))),
        "image of one pixel": _of(user(image(1, 1), "Which colour?")),
        "image as a long strip": _of(user(image(16, 1500), "Read it.")),
        "image that is too large": _of(user(image(700, 450), "Where is the circle?")),
        "image, max_pixels": _of(user(image(300, 400), "Where is the circle?"), max_pixels=20_000),
        "image under the least, max_pixels lower still": _of(user(image(40, 40), "Which?"), max_pixels=2_048),
        # Several
        "two images": _of(user(image(64, 96), image(96, 64), "Which picture has a red ring?")),
        "two images of one size": _of(user(image(), image(), "What differs?")),
        "the same image twice": _of(user(twice, twice, "What differs?")),
        "three images, text between": _of(user("a", image(), "b", image(64, 64), "c", image(64, 128), "d")),
        "five images, no text": _of(user(*(image(64, 64 + 32 * n) for n in range(5)))),
        # Videos
        "video, text": _of(user(frames(), "What moves, and which way?")),
        "text, video": _of(user("What moves?", frames(6, 64, 96))),
        "video alone": _of(user(frames(2))),
        "video of an odd number": _of(user(frames(5, 70, 90), "Which way?")),
        "video of seventeen": _of(user(frames(17, 32, 40), "Which way?")),
        "video, slow": _of(user(frames(6), "Which way?"), fps=0.5),
        "video, fast": _of(user(frames(7), "Which way?"), fps=3.3),
        "two videos": _of(user(frames(4, 64, 64), frames(3, 96, 64), "Which is longer?")),
        "two videos, text between": _of(user("One:", frames(4, 64, 64), "Two: 2", frames(4, 64, 64), "Same?")),
        "video after a digit": _of(user("Film 3", frames(4), "4 frames?")),
        "video after a line": _of(user("Film:\n", frames(4), "\nThe end.")),
        "video file": _of(user(file(60, "25"), "What moves?")),
        "video file, broken rate": _of(user(file(95, "30000/1001"), "What moves?")),
        "video file, short": _of(user(file(3, "10"), "What moves?")),
        "video file, fps": _of(user(file(40, "12"), "What moves?"), fps=4),
        "video file and frames": _of(user(file(30, "24"), "then", frames(5), "Same?")),
        # Mixed
        "image, video": _of(user(image(), frames(), "Is the thing of the picture in the video?")),
        "video, image": _of(user(frames(), image(), "Is the thing of the picture in the video?")),
        "image, video, image": _of(user(image(64, 64), frames(3), image(128, 64), "What is in all?")),
        "video, image, video": _of(user(frames(2), image(64, 64), frames(5), "What is in all?")),
        "mixed, text between": _of(
            user("a", image(), "b", frames(), "c", frames(3), image(64, 64), "d", image(64, 96), frames(2), "e")
        ),
        "mixed with files": _of(user(file(20, "10"), image(), file(20, "5"), image(64, 64), "What is in all?")),
        # Turns
        "image in the first turn": _of(user(image(), "What do you see?"), said("a red ring"), user("Where is it?")),
        "image in the second turn": _of(user("Hello"), said("Hello!"), user(image(), "What do you see?")),
        "image in each turn": _of(
            user(image(), "What do you see?"), said("a red ring"), user("And here?", image(64, 64)), said("nothing"),
            user(image(64, 128), "And here?"),
        ),
        "mixed over turns": _of(
            user(frames(), "Which way?"), said("up"), user(image(), frames(3, 96, 64)), said("down"),
            user("And", image(64, 64), "?"), said("I do not know"), user("Why?"),
        ),
        "reasoning before": _of(
            user(image(), "How many?"), said("3", reasoning_content="There are three."), user(image(64, 64), "Now?")
        ),
        # System, thinking, tools
        "system": _of(system("Be brief."), user(image(), "What is in the picture?")),
        "system, no thinking": _of(system("Be brief."), user(frames(), image(), "What?"), enable_thinking=False),
        "thinking": _of(user(image(), image(64, 64), "What?"), enable_thinking=True),
        "no thinking": _of(user(image(), "What is in the picture?"), enable_thinking=False),
        "tools": _of(user(image(), "Show me the left side."), tools=[TOOL]),
        "tool called": _of(
            system("Be brief."), user(image(), frames(), "Show me the left side."),
            said("", tool_calls=[called("left")]), {"role": "tool", "content": "done"}, tools=[TOOL],
        ),
        "tool that gives an image": _of(
            user(image(), "Show me both sides."), said("I cut.", tool_calls=[called("left"), called("right")]),
            user(image(96, 64), "left", role="tool"), user("right", image(96, 64), role="tool"), tools=[TOOL],
        ),
        # Text
        "white space": _of(user("  \n Look:  ", image(), "\n\n  so?\n ")),
        "other scripts": _of(user("Что здесь? 这是什么?", image(64, 64), " e\u0301 😀 \u00e9", frames(2))),
        "text like a time": _of(user("<0.2 seconds>", frames(4), "<1.2 seconds> is what?")),
        "no media": _of(user("What is 17 + 25?")),
    }  # fmt: skip


NAMED = _named()


def random_conversation(seed: int) -> Conversation:
    """Any number of turns, pictures and videos in any order."""
    rng = np.random.RandomState(seed)
    words = ["What", " is", " in ", "the picture", "?", "\n", "3", " red ring", "<", "é", "  ", ":"]

    def pick(*choices: Any) -> Any:
        return choices[rng.randint(len(choices))]

    def side(least: int, most: int) -> int:
        return int(round(np.exp(rng.uniform(np.log(least), np.log(most)))))

    def part() -> str | Shown:
        kind, number = rng.randint(5), int(rng.randint(1 << 30))
        if kind < 2:
            return "".join(pick(*words) for _ in range(1 + rng.randint(6)))
        if kind < 4:
            return Shown(side(8, 500), side(8, 500), seed=number)
        if rng.randint(3):
            return Shown(side(20, 160), side(20, 160), 2 + rng.randint(9), seed=number)
        even = 2 * side(16, 80), 2 * side(16, 80)
        return Shown(*even, 1 + rng.randint(60), pick("5", "10", "24", "25", "30000/1001", "60"), seed=number)

    messages = [system("Be brief.")] if rng.randint(3) == 0 else []
    for turn in range(1 + rng.randint(3)):
        if turn:
            messages.append(said(pick("a red ring", "", "two lines\n\nof text")))
        messages.append(user(*(part() for _ in range(1 + rng.randint(5)))))
    options = {} if rng.randint(2) else {"enable_thinking": bool(rng.randint(2))}
    if rng.randint(4) == 0:
        options["tools"] = [TOOL]
    if rng.randint(4) == 0:
        options["fps"] = pick(1.0, 0.5, 3.3, 4.0)
    return Conversation(tuple(messages), options)
