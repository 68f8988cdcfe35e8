"""Tab in a chat: commands, their files and words, and paths inside a message. Knows folders, nothing of prompts."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator

from mlx_qwen35.cli.chat.commands import COMMANDS

_FILES = ("image", "video", "save", "load", "model")
_PATH = re.compile(r"(?:^|\s)((?:~|\.{1,2})?/\S*)$")


def candidates(text: str, words: Callable[[str], list[str]]) -> Iterator[tuple[str, int]]:
    """What could stand at the end of `text`, which is the last line up to the cursor: (the whole word, how many of its
    characters are there). words: a command's name -> what it may be given, beside a file."""
    if re.fullmatch(r"/[A-Za-z-]*", text):
        for name, (argument, _) in COMMANDS.items():
            if name.startswith(text[1:].lower()):
                yield f"/{name}{' ' if argument else ''}", len(text)
        if text != "/":
            return
    command = re.match(r"/([A-Za-z-]+)\s+(.*)", text)
    if command:
        name, begun = command[1].lower(), command[2]
        yield from ((word, len(begun)) for word in words(name) if word.startswith(begun))
        if name in _FILES:
            yield from ((path, len(begun)) for path in paths(begun))
    elif path := _PATH.search(text):
        yield from ((found, len(path[1])) for found in paths(path[1]))


def paths(begun: str) -> list[str]:
    """The files and folders whose names go on so; hidden ones only where the dot is there."""
    folder, name = os.path.split(begun)
    found = []
    try:
        with os.scandir(os.path.expanduser(folder) or ".") as entries:
            for entry in entries:
                if entry.name.startswith(name) and (name.startswith(".") or not entry.name.startswith(".")):
                    found.append(os.path.join(folder, entry.name) + ("/" if entry.is_dir() else ""))
    except OSError:
        pass
    return sorted(found)
