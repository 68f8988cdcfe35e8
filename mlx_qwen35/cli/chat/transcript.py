"""What was said, as text: the last exchanges for who comes back, and transcripts in Markdown or JSON.

Knows messages and exchanges. Knows nothing of models, sessions or screens.
"""

from __future__ import annotations

import json
import os
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.errors import PromptError
from mlx_qwen35.machine.files import flush
from mlx_qwen35.text.cells import harmless

if TYPE_CHECKING:
    from mlx_qwen35.conversation import Exchange, Message

_LINES, _LENGTH = 4, 400  # of a message that is recalled
_NAMES = {"user": "You", "tool": "Result", "assistant": "Answer", "system": "System"}


def recalled(exchanges: Sequence[Exchange], columns: int, count: int = 2) -> str:
    """The last exchanges, shortened, with reasoning folded to its length."""
    shown = []
    for questions, answer in exchanges[-count:]:
        shown += [_short(_asked(question), "> ", columns) for question in questions]
        if reasoning := answer.get("reasoning_content"):
            words = len(reasoning.split())
            shown.append(f"[thought, {words} word{'' if words == 1 else 's'}]")
        if answer["content"]:
            shown.append(_short(answer["content"], "", columns))
        shown += [f"[called {call['function']['name']}]" for call in answer.get("tool_calls", [])]
    return "\n".join(shown)


def question_text(questions: Sequence[Message]) -> str:
    """The words of what was asked, without what it shows."""
    return _text(questions[-1]["content"]) if questions else ""


def shown_with(questions: Sequence[Message]) -> list[Message]:
    """What it shows, as parts."""
    content = questions[-1]["content"] if questions else ""
    return [part for part in content if part["type"] != "text"] if isinstance(content, list) else []


def write(path: Path, messages: Sequence[Message], system: str | None) -> None:
    """A transcript, in place of none: Markdown to read for .md, else messages in JSON, which `read` reads.

    Pictures and videos are named and not written. Raises PromptError where the file is there or cannot be written.
    """
    told = [*([{"role": "system", "content": system}] if system else []), *messages]
    text = _markdown(told) if path.suffix.lower() == ".md" else _json(told)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        raise PromptError(f"{path} is there already: give another name") from None
    except OSError as error:
        raise PromptError(f"{path} cannot be written ({error.strerror}): give another name") from error
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            flush(file.fileno())
    except OSError as error:
        with suppress(OSError):
            path.unlink()
        raise PromptError(f"{path} cannot be written ({error.strerror}): check the disk") from error


def read(path: Path) -> tuple[list[Exchange], str | None]:
    """(exchanges, system message) of messages in JSON: a list, or {"messages": [...]}.

    Raises PromptError where it is none, or does not end with an answer.
    """
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PromptError(f"{path} cannot be read ({error.strerror}): check the path") from error
    except (ValueError, RecursionError) as error:
        raise PromptError(f"{path} is no JSON ({error})") from error
    messages = told.get("messages") if isinstance(told, dict) else told
    if not isinstance(messages, list) or not all(isinstance(one, dict) and "role" in one for one in messages):
        raise PromptError(f'{path} holds no messages: it should be a list of {{"role": ..., "content": ...}}')
    system: list[str] = []
    while messages and messages[0]["role"] in ("system", "developer"):
        system.append(_text(messages.pop(0).get("content") or ""))
    exchanges: list[Exchange] = []
    asked: list[Message] = []
    for message in messages:
        if message["role"] == "assistant" and asked:
            exchanges.append((asked, {"content": "", **message}))
            asked = []
        elif message["role"] == "assistant":
            raise PromptError(f"{path}: an answer has no question before it")
        else:
            asked.append(message)
    if asked:
        raise PromptError(f"{path} ends with a question that has no answer: take it out, and ask it here")
    return exchanges, "\n\n".join(system) or None


def _json(messages: Sequence[Message]) -> str:
    plain = [{**message, "content": _plain(message["content"])} for message in messages]
    return json.dumps({"messages": plain}, ensure_ascii=False, indent=1) + "\n"


def _plain(content: Any) -> Any:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] if part["type"] == "text" else f"[{part['type']}]" for part in content)


def _markdown(messages: Sequence[Message]) -> str:
    shown = []
    for message in messages:
        shown.append(f"## {_NAMES.get(message['role'], message['role'])}")
        if reasoning := message.get("reasoning_content"):
            shown.append(textwrap.indent(reasoning, "> ", lambda line: True))
        if message["content"]:
            shown.append(_plain(message["content"]))
        for call in message.get("tool_calls", []):
            shown.append(f"```json\n{json.dumps(call['function'], ensure_ascii=False, indent=1)}\n```")
    return "\n\n".join(shown) + "\n"


def _asked(message: Message) -> str:
    return _plain(message["content"])


def _text(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part["text"] for part in content if part.get("type") == "text")


def _short(text: str, mark: str, columns: int) -> str:
    """Its first lines, broken and shortened for the terminal."""
    lines: list[str] = []
    for line in harmless(text)[:_LENGTH].strip().splitlines():
        lines += textwrap.wrap(line, max(columns - len(mark), 10)) or [""]
    cut = len(lines) > _LINES or len(text) > _LENGTH
    return "\n".join(mark + line for line in lines[:_LINES]) + (" ..." if cut else "")
