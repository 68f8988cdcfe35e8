"""Who may ask: which hosts a server answers as, which web pages may use it, and who has its key.

Knows headers. A server on this machine is within reach of every page that a browser shows: a page elsewhere says its
Origin, and one that was resolved to this machine says another Host. Knows nothing of what is asked.
"""

from __future__ import annotations

import hmac
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from mlx_qwen35.serving import http
from mlx_qwen35.serving.http import Receive, Scope, Send
from mlx_qwen35.serving.refusal import Refusal

MOST_BYTES = 64 << 20
_METHODS = "GET, POST, DELETE, HEAD, OPTIONS"
_MAX_AGE = "600"  # seconds that a browser may remember what it may do

Refuse = Callable[[str, Refusal], Mapping[str, object]]


@dataclass(frozen=True)
class Doors:
    """host: that is listened on. api_key: that has to be given; None: none. cors: origins of web pages that may ask,
    "*" for all. allowed_hosts: names beside its own that the server answers to, "*" for all. most_bytes: of a body.
    open_paths: that need no key."""

    host: str = "127.0.0.1"
    api_key: str | None = None
    cors: Sequence[str] = ()
    allowed_hosts: Sequence[str] = ()
    most_bytes: int = MOST_BYTES
    open_paths: frozenset[str] = frozenset({"/health"})


class Guard:
    """An ASGI application around another. refuse: path, error -> its JSON."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]], doors: Doors, refuse: Refuse) -> None:
        self._app, self._doors, self._refuse = app, doors, refuse
        own = {"localhost", doors.host.lower().strip("[]")}
        if not is_loopback(doors.host):
            name = socket.gethostname().lower()
            own |= {name, f"{name.partition('.')[0]}.local"}
        self._names = own | {name.lower() for name in doors.allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = http.headers_of(scope)
        shared: dict[str, str] = {}
        try:
            self._check_host(headers)
            shared = self._check_origin(headers.get("origin"), headers)
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                return await self._preflight(headers, shared, send)
            self._check_key(scope["path"], headers)
            self._check_length(headers)
        except Refusal as refusal:
            extra = {"www-authenticate": "Bearer"} if refusal.status == 401 else {}
            told = self._refuse(scope["path"], refusal)
            return await http.send_json(send, refusal.status, told, {**shared, **extra, "connection": "close"})
        await self._app(scope, receive, _with(send, shared) if shared else send)

    def _check_host(self, headers: Mapping[str, str]) -> None:
        given = headers.get("host", "")
        name = _name(given)
        if "*" in self._names or name in self._names or is_loopback(name):
            return
        if not is_loopback(self._doors.host) and _is_address(name):  # which no name was resolved to
            return
        raise Refusal(
            "forbidden", f"the server does not answer as {given[:80]!r}: start it with --allowed-host {name[:80]}"
        )

    def _check_origin(self, origin: str | None, headers: Mapping[str, str]) -> dict[str, str]:
        """Headers that a page which may ask needs."""
        if origin is None or origin != "null" and urlsplit(origin).netloc.lower() == headers.get("host", "").lower():
            return {}
        allowed = self._doors.cors
        if "*" not in allowed and origin not in allowed:
            raise Refusal(
                "forbidden", f"web pages of {origin[:80]} may not use this server: start it with --cors {origin[:80]}"
            )
        return {
            "access-control-allow-origin": "*" if "*" in allowed else origin,
            "access-control-expose-headers": "retry-after, x-request-id",
            "vary": "origin",
        }

    async def _preflight(self, headers: Mapping[str, str], shared: Mapping[str, str], send: Send) -> None:
        told = {**shared, "access-control-allow-methods": _METHODS, "access-control-max-age": _MAX_AGE}
        if wanted := headers.get("access-control-request-headers"):
            told["access-control-allow-headers"] = wanted
        if headers.get("access-control-request-private-network") == "true":
            told["access-control-allow-private-network"] = "true"
        await http.begin(send, 204, "text/plain", told)
        await http.put(send, b"", more=False)

    def _check_key(self, path: str, headers: Mapping[str, str]) -> None:
        if self._doors.api_key is None or path in self._doors.open_paths:
            return
        kind, _, token = headers.get("authorization", "").partition(" ")
        given = [token.strip() if kind.lower() == "bearer" else "", headers.get("x-api-key", "")]
        key = self._doors.api_key.encode()
        if not any([hmac.compare_digest(each.encode("utf-8", "replace"), key) for each in given]):
            raise Refusal(
                "unauthorized", "the key is missing or another one: send it as `Authorization: Bearer KEY` or x-api-key"
            )

    def _check_length(self, headers: Mapping[str, str]) -> None:
        length = headers.get("content-length", "0")
        if not length.isascii() or not length.isdigit() or len(length) > 18:
            raise Refusal("invalid", "Content-Length is no number")
        if int(length) > self._doors.most_bytes:
            raise http.too_large(self._doors.most_bytes)


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this machine's own, out of reach of others."""
    name = host.lower().strip("[]")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _name(host: str) -> str:
    """Of a Host header, without its port and brackets."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if host.count(":") == 1 else host


def _with(send: Send, headers: Mapping[str, str]) -> Send:
    """A send that adds headers."""
    more = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]

    async def sent(message: dict) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), *more]}
        await send(message)

    return sent
