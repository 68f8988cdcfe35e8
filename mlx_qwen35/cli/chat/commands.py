"""What a line of a chat is: a command or a message. Knows the commands' names, and nothing of what they do."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from mlx_qwen35.errors import PromptError

_COMMAND = re.compile(r"/([A-Za-z][A-Za-z-]*|\?)(?:\s+(.*))?", re.DOTALL)


@dataclass(frozen=True)
class Command:
    name: str
    argument: str = ""


# name: (argument, what it does)
COMMANDS = {
    "help": ("", "this list"),
    "undo": ("", "remove the last question and its answer"),
    "regen": ("[N]", "answer the last question again, with at most N tokens"),
    "edit": ("[TEXT]", "rephrase the last question: TEXT, or edit it at the prompt"),
    "system": ("[TEXT]", "show or set the system message; - for none"),
    "think": ("[WORD]", "show or set reasoning: on, off, auto, or an effort: low, medium, high, ..."),
    "image": ("FILE", "attach a picture to the next message"),
    "video": ("FILE", "attach a video to the next message"),
    "save": ("[FILE]", "save the chat: .md and .json are transcripts, anything else a session"),
    "load": ("FILE", "continue a session or a .json transcript"),
    "model": ("[NAME]", "show the model's name, or switch to another model"),
    "stats": ("", "speed and memory of the last answer"),
    "reset": ("", "start over"),
    "exit": ("", "leave (or Ctrl-D)"),
}
_OTHER_NAMES = {"?": "help", "quit": "exit", "bye": "exit", "q": "exit", "clear": "reset", "new": "reset"}
_OTHER_NAMES |= {"retry": "regen", "regenerate": "regen", "img": "image", "picture": "image"}
KEYS = (
    'Several lines: paste them, end a line with \\, or write between """ and """. Ctrl-C ends an answer. A line that '
    "begins with /word is a command; a path such as /tmp/x, //, or a line that begins with a space is a message."
)


def read_line(text: str) -> Command | str:
    """The command that a message is, or the message.

    A command is one line that begins with a slash and letters, and then ends or goes on after a space; only /system and
    /edit may have more lines. All else is a message: a path such as /etc/hosts, //, a line that begins with a space.
    Raises PromptError for a command that there is not.
    """
    found = _COMMAND.fullmatch(text.rstrip())
    if found is None:
        return text
    word, argument = found[1].lower(), (found[2] or "").strip()
    name = _OTHER_NAMES.get(word, word)
    if "\n" in text.strip() and name not in ("system", "edit"):
        return text
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, [*COMMANDS, *_OTHER_NAMES], 1, 0.5)
        meant = f"did you mean /{near[0]}?" if near else "/help lists them."
        raise PromptError(
            f"there is no command /{found[1]}: {meant} Begin the line with a space if it is a message"
        )
    if argument and not COMMANDS[name][0]:
        raise PromptError(
            f"/{name} takes nothing after it: write /{name} alone, or begin the line with a space if it is a message"
        )
    return Command(name, argument)


def help_text(columns: int = 80) -> str:
    """The commands, one a line, or two where lines are short."""
    shown = {f"/{name} {argument}".strip(): told for name, (argument, told) in COMMANDS.items()}
    longest = max(map(len, shown))
    lines = [f"{use:{longest}}  {told}" if columns >= 60 else f"{use}\n{told}" for use, told in shown.items()]
    return "\n".join([*lines, KEYS])
