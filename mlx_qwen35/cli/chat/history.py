"""What was typed in earlier chats: a file of this user alone, bounded in size.

Knows the file. Knows nothing of prompts. It is a convenience: what cannot be read or written is left out.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from pathlib import Path

from mlx_qwen35.machine.system import state_folder

MOST = 1000  # messages kept
MOST_LENGTH = 20_000  # characters of one


def history_file() -> Path | None:
    """MLX_QWEN35_HISTORY, or a file in the user's state folder; None where that variable is empty."""
    given = os.environ.get("MLX_QWEN35_HISTORY")
    if given is not None:
        return Path(given).expanduser() if given else None
    return state_folder() / "chat-history.jsonl"


def read(path: Path) -> list[str]:
    """The last messages, oldest first; shortens a file that has grown beyond twice of them."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    found = []
    for line in lines[-MOST:]:
        with suppress(ValueError):
            text = json.loads(line)
            found += [text] if isinstance(text, str) else []
    if len(lines) > 2 * MOST:
        with suppress(OSError):
            beside = path.with_name(f"{path.name}.{os.getpid()}")
            handle = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(b"\n".join(lines[-MOST:]) + b"\n")
            os.replace(beside, path)
    return found


def add(path: Path, text: str) -> None:
    """Appends a message, but for one that begins with a space, which is how shells are told to forget one."""
    if not text.strip() or text[0] in " \t" or len(text) > MOST_LENGTH:
        return
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            os.write(handle, json.dumps(text).encode() + b"\n")
        finally:
            os.close(handle)
