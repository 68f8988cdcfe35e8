"""Who gets in: hosts, origins and keys, one header at a time."""

import asyncio
from typing import Any

import pytest

from mlx_qwen35.serving.guard import Doors, Guard, is_loopback
from mlx_qwen35.serving.refusal import Refusal


async def inside(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"in"})


def told(path: str, refusal: Refusal) -> dict[str, str]:
    return {"path": path, "kind": refusal.kind, "message": refusal.message}


def ask(
    doors: Doors, method: str = "GET", path: str = "/v1/models", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """-> status, headers, body. headers: with _ for -, and none where there is none."""
    given = {"host": "127.0.0.1:1234", **headers}
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b""}

    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()]
    scope = {"type": "http", "method": method, "path": path, "headers": pairs}
    asyncio.run(Guard(inside, doors, told)(scope, receive, send))
    got = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return sent[0]["status"], got, b"".join(message.get("body", b"") for message in sent[1:])


@pytest.mark.parametrize("host", ["127.0.0.1:1234", "localhost:1234", "LOCALHOST", "[::1]:1234", "127.0.0.2", "::1"])
def test_its_own_names(host: str) -> None:
    assert ask(Doors(), host=host)[0] == 200


@pytest.mark.parametrize("host", ["evil.example:1234", "localhost.evil.example", "192.168.1.7:1234", "", "a:b:c"])
def test_a_name_that_was_resolved_to_this_machine(host: str) -> None:
    status, _, body = ask(Doors(), host=host)
    assert status == 403 and b'"forbidden"' in body and b"--allowed-host" in body


def test_allowed_hosts() -> None:
    assert ask(Doors(allowed_hosts=("mac.lan",)), host="Mac.LAN:1234")[0] == 200
    assert ask(Doors(allowed_hosts=("*",)), host="anything")[0] == 200
    wide = Doors(host="0.0.0.0", api_key="k")
    assert ask(wide, host="192.168.1.7:1234", x_api_key="k")[0] == 200  # an address is no name that was resolved
    assert ask(wide, host="evil.example", x_api_key="k")[0] == 403


def test_a_page_elsewhere_may_not_ask() -> None:
    for origin in ("http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1.evil.example:1234"):
        status, headers, body = ask(Doors(), origin=origin)
        assert status == 403 and b"--cors" in body
        assert "access-control-allow-origin" not in headers
    assert ask(Doors(), origin="http://127.0.0.1:1234")[0] == 200  # its own page


def test_cors_by_option() -> None:
    doors = Doors(cors=("http://localhost:3000",))
    status, headers, _ = ask(doors, origin="http://localhost:3000")
    assert status == 200 and headers["access-control-allow-origin"] == "http://localhost:3000"
    assert headers["vary"] == "origin"
    assert ask(doors, origin="http://localhost:3001")[0] == 403
    assert ask(Doors(cors=("*",)), origin="null")[1]["access-control-allow-origin"] == "*"


def test_preflight_needs_no_key() -> None:
    doors = Doors(cors=("http://a.example",), api_key="secret")
    asking = {"access_control_request_method": "POST", "access_control_request_headers": "authorization, x-a"}
    status, headers, body = ask(doors, "OPTIONS", origin="http://a.example", **asking)
    assert status == 204 and body == b""
    assert headers["access-control-allow-headers"] == "authorization, x-a"
    assert "POST" in headers["access-control-allow-methods"]
    assert ask(doors, "OPTIONS", origin="http://b.example", **asking)[0] == 403


def test_a_refusal_can_be_read_by_a_page_that_may_ask() -> None:
    doors = Doors(cors=("http://a.example",), api_key="secret")
    status, headers, _ = ask(doors, origin="http://a.example")
    assert status == 401 and headers["access-control-allow-origin"] == "http://a.example"


@pytest.mark.parametrize(
    "headers, status",
    [
        ({}, 401),
        ({"authorization": "Bearer secret"}, 200),
        ({"authorization": "bearer  secret "}, 200),
        ({"authorization": "Basic secret"}, 401),
        ({"authorization": "Bearer"}, 401),
        ({"authorization": "Bearer secre"}, 401),
        ({"authorization": "Bearer sécret"}, 401),
        ({"x_api_key": "secret"}, 200),
        ({"x_api_key": "secret2"}, 401),
        ({"authorization": "Bearer wrong", "x_api_key": "secret"}, 200),
    ],
)
def test_key(headers: dict[str, str], status: int) -> None:
    got, told, body = ask(Doors(api_key="secret"), **headers)
    assert got == status
    if status == 401:
        assert told["www-authenticate"] == "Bearer" and b"secret" not in body
    assert ask(Doors(api_key="secret"), path="/health", **headers)[0] == 200


def test_length() -> None:
    doors = Doors(most_bytes=100)
    assert ask(doors, "POST", content_length="100")[0] == 200
    assert ask(doors, "POST", content_length="101")[0] == 413
    for odd in ("-1", "1e3", "9" * 30, "²"):
        assert ask(doors, "POST", content_length=odd)[0] == 400


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.8.9.10", "::1", "[::1]", "a.localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "localhost.example", "", "mac.local")))
