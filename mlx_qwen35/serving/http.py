"""Bodies in and JSON out, in the words of ASGI: bounded, with time limits, and strict about JSON.

Knows ASGI messages and JSON. Knows neither interfaces nor models.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any, NoReturn

from mlx_qwen35.serving.refusal import Refusal

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

BODY_WITHIN = 60.0  # seconds without a byte of a body that was begun, and those that all may take beside its length's
BODY_PACE = 10_000  # bytes a second that a body has to come in at the least
SENT_WITHIN = 120.0  # seconds that a reader may take nothing
WIRE = "mlx_qwen35.wire"  # in a scope's state: where chunks go without ASGI, if there is such a place (connection.py)
_LARGE = 1 << 18  # bytes of JSON that are read on another thread
_SURROGATE = re.compile("[\ud800-\udfff]")


class GoneError(Exception):
    """The client went away, or takes nothing any more."""


async def read_body(receive: Receive, most: int) -> bytes:
    """The whole body. Raises Refusal for one above `most` bytes or one that does not come, GoneError."""
    pieces, size, begun = [], 0, time.monotonic()
    while True:
        left = begun + BODY_WITHIN + size / BODY_PACE - time.monotonic()
        try:
            message = await asyncio.wait_for(receive(), max(0.0, min(BODY_WITHIN, left)))
        except (TimeoutError, asyncio.TimeoutError):
            raise Refusal("invalid", f"the body did not come: {size:,} bytes in {BODY_WITHIN:.0f} seconds") from None
        if message["type"] == "http.disconnect":
            raise GoneError
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            raise too_large(most)
        pieces.append(piece)
        if not message.get("more_body"):
            return b"".join(pieces)


def too_large(most: int) -> Refusal:
    """The error for a body above `most` bytes."""
    return Refusal("too_large", f"the body has more than {most:,} bytes: send less, or smaller pictures")


async def read_json(body: bytes) -> Mapping[str, Any]:
    """The object of a body, {} of an empty one. Raises Refusal."""
    if not body.strip():
        return {}
    if len(body) < _LARGE:
        return _object(body)
    return await asyncio.get_running_loop().run_in_executor(None, _object, body)


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_number)
    except UnicodeDecodeError:
        raise Refusal("invalid", "the body is no text in UTF-8: send JSON in it") from None
    except RecursionError:
        raise Refusal("invalid", "the body is nested too deeply") from None
    except ValueError as error:  # digits without end are one, too
        raise Refusal("invalid", f"the body is no JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal("invalid", "the body is no JSON object: send one")
    return _mended(value) if b"\\ud" in body or b"\\uD" in body else value


def _no_number(word: str) -> NoReturn:
    raise ValueError(f"{word} is no number of JSON")


def _mended(value: Any) -> Any:
    """Half characters, which clients make that cut texts anywhere, as the sign for an unknown one."""
    if isinstance(value, str):
        return _SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [_mended(each) for each in value]
    if isinstance(value, dict):
        return {_mended(name): _mended(each) for name, each in value.items()}
    return value


def headers_of(scope: Scope) -> dict[str, str]:
    """Names in lower case; the last of several."""
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def as_json(value: Any) -> bytes:
    """As it goes over the wire; what JSON cannot say is null."""
    try:
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()
    except (ValueError, UnicodeEncodeError):
        return json.dumps(_sayable(value), separators=(",", ":")).encode()


def _sayable(value: Any) -> Any:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {name: _sayable(each) for name, each in value.items()}
    return [_sayable(each) for each in value] if isinstance(value, (list, tuple)) else value


async def send_json(
    send: Send, status: int, value: Any, headers: Mapping[str, str] | None = None, *, head: bool = False
) -> None:
    """A whole response. head: without its body, which was not asked for."""
    body = as_json(value)
    await begin(send, status, "application/json", {"content-length": str(len(body)), **(headers or {})})
    await put(send, b"" if head else body, more=False)


async def send_refusal(send: Send, refusal: Refusal, told: Mapping[str, Any], *, head: bool = False) -> None:
    """An error, in the words of an interface."""
    extra = {} if refusal.retry_after is None else {"retry-after": str(refusal.retry_after)}
    await send_json(send, refusal.status, told, extra, head=head)


async def begin(send: Send, status: int, media_type: str, headers: Mapping[str, str]) -> None:
    """The first line and the headers."""
    named = {"content-type": media_type, **headers}
    pairs = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in named.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})


async def put(send: Send, body: bytes, *, more: bool) -> None:
    """A piece of the body. Raises GoneError where it is not taken."""
    try:
        await asyncio.wait_for(send({"type": "http.response.body", "body": body, "more_body": more}), SENT_WITHIN)
    except (TimeoutError, asyncio.TimeoutError, OSError):
        raise GoneError(f"nothing was taken for {SENT_WITHIN:.0f} s") from None


class Pace:
    """Whether the reader of a stream takes what it is given. One clock for all pieces: a limit of its own for each
    would cost more than the piece."""

    def __init__(self, scope: Scope) -> None:
        self._since: float | None = None  # when a piece was given that is not taken yet
        wire = scope.get("state", {}).get(WIRE)
        self._wire: Callable[[bytes], Awaitable[None]] | None = None
        if wire is not None and scope.get("http_version") == "1.1":
            self._wire = wire.put

    async def put(self, send: Send, body: bytes) -> None:
        """A piece, with more to come. Raises GoneError."""
        self._since = time.monotonic()
        try:
            if self._wire is None:
                await send({"type": "http.response.body", "body": body, "more_body": True})
            else:
                await self._wire(body)
        except OSError:
            raise GoneError from None
        finally:
            self._since = None

    @property
    def stalled(self) -> bool:
        """Whether nothing was taken for SENT_WITHIN seconds."""
        return self._since is not None and time.monotonic() - self._since > SENT_WITHIN


async def gone(receive: Receive) -> None:
    """Returns when the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass
