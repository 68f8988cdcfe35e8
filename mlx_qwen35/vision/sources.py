"""Where a picture or a video comes from: a path, bytes, a data: URL, an open file, or, if asked for, the network.

Knows places and bytes. Knows nothing of what is in them.
"""

from __future__ import annotations

import base64
import binascii
import io
import tempfile
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from mlx_qwen35.errors import PromptError

LARGEST_DOWNLOAD = 4 << 30
_PATIENCE = 30  # seconds without a byte


def open_source(source: object, what: str, *, fetch: bool = False) -> tuple[Path | BinaryIO, str]:
    """-> (a file that is there, or an open one to read and seek in; how to call it in a message)

    source: a path (str, Path or file:// URL), bytes, a data: URL, an open binary file, or, only with `fetch`, an
    http(s) URL. what: "picture" or "video", for messages. Raises PromptError for anything else, or if nothing is there.
    """
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), f"the {what} of {len(source)} bytes"
    if isinstance(source, str) and source[:5].lower() == "data:":
        return io.BytesIO(_data_url(source, what)), f"the {what} in a data: URL"
    if isinstance(source, str) and source[:8].lower().startswith(("http://", "https://")):
        if not fetch:
            raise PromptError(
                f"the {what} {_short(source)} lies on the network and is not fetched unless asked for "
                "(fetch=True, --fetch); or download it and give its path"
            )
        return _download(source, what), _short(source)
    if isinstance(source, (str, Path)):
        return _path(source, what), f"the {what} {_short(str(source))}"
    if hasattr(source, "read") and hasattr(source, "seek"):
        return source, f"the {what} {_short(str(getattr(source, 'name', 'in an open file')))}"  # type: ignore[return-value]
    raise PromptError(f"a {what} is a path, bytes or a data: URL, not {type(source).__name__}")


def _path(source: str | Path, what: str) -> Path:
    text = str(source)
    path = Path(unquote(urlsplit(text).path)) if text.startswith("file://") else Path(text).expanduser()
    try:
        found = path.is_file()
    except (OSError, ValueError):  # a name that is too long, or with a zero in it
        found = False
    if not found:
        raise PromptError(f"no {what} at {_short(text)}; check the path")
    return path


def _data_url(url: str, what: str) -> bytes:
    head, comma, body = url.partition(",")
    if not comma:
        raise PromptError(f"the data: URL of a {what} has no comma and so no data: data:{what}/...;base64,...")
    if not head.lower().rstrip().endswith(";base64"):
        return unquote_to_bytes(body)
    text = "".join(unquote(body).split())
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PromptError(f"the data: URL of a {what} is not base64 ({error}); encode it again") from None


def _download(url: str, what: str) -> BinaryIO:
    import urllib.request

    request = urllib.request.Request(url, headers={"User-Agent": "mlx-qwen35"})
    file = tempfile.TemporaryFile()
    try:
        with urllib.request.urlopen(request, timeout=_PATIENCE) as answer:
            while piece := answer.read(1 << 20):
                file.write(piece)
                if file.tell() > LARGEST_DOWNLOAD:
                    raise PromptError(f"the {what} {_short(url)} is larger than {LARGEST_DOWNLOAD >> 30} GiB")
    except (OSError, ValueError) as error:
        file.close()
        if isinstance(error, PromptError):
            raise
        raise PromptError(f"the {what} {_short(url)} could not be fetched: {error}") from error
    file.seek(0)
    return file  # type: ignore[return-value]


def _short(text: str) -> str:
    if not text.strip():
        return repr(text)
    return text if len(text) <= 120 else f"{text[:100]}... ({len(text)} characters)"
