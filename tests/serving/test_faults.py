"""What goes wrong between a client and the server: the others' answers are untouched, and nothing is left running."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path
from typing import Any

import httpx
import pytest

from mlx_qwen35.errors import CheckpointError, Qwen35Warning
from mlx_qwen35.serving import connection, http, pool
from mlx_qwen35.serving.apis.openai_chat import ChatCompletions
from mlx_qwen35.serving.endpoint import Endpoint
from mlx_qwen35.serving.metrics import Metrics
from mlx_qwen35.serving.server import ServerError, made
from tests.conftest import CHECKOUT
from tests.serving.running import Running, running
from tests.soak import examples

PATH = "/v1/chat/completions"
ENDLESS = {"991": -100, "993": -100}  # the demo's tokens that end a turn


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(parallel=8) as made:
        yield made


@pytest.fixture(autouse=True)
def nothing_is_left(server: Running) -> Iterator[None]:
    yield
    assert server.becomes_idle(10)


def body(text: str = "What is 17 + 25?", **more: Any) -> dict[str, Any]:
    return {"model": "demo", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 60} | more


def request(content: bytes, length: int | None = None) -> bytes:
    length = len(content) if length is None else length
    head = f"POST {PATH} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n"
    return head.encode() + content


def connected(server: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server.port), timeout=10)


def answered(server: Running, text: str = "What is 17 + 25?") -> str:
    response = httpx.post(server.url + PATH, json=body(text), timeout=60)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def status_of(sent: socket.socket) -> int:
    """Reads to the end of the connection."""
    got = b""
    while more := sent.recv(1 << 16):
        got += more
    return int(got.split(b" ", 2)[1]) if got else 0


def answer(sent: socket.socket) -> tuple[int, bytes]:
    """One answer, status and body, in however many segments it comes."""
    response = HTTPResponse(sent)
    response.begin()
    return response.status, response.read()


def test_clients_that_go_away_anywhere(server: Running) -> None:
    """At random bytes of what they send and of what they get, streamed or not, while others are answered."""
    expected = answered(server)
    wrong: list[str] = []

    def others() -> None:
        for _ in range(3):
            if (got := answered(server)) != expected:
                wrong.append(got)

    def leaving(which: int) -> None:
        draw = random.Random(which)
        for number in range(which, examples(200, 3), 10):
            asked = body("Sort these words: queen, jacket, violin", stream=number % 2 == 0, max_tokens=500)
            asked["logit_bias"] = ENDLESS
            data = request(json.dumps(asked).encode())
            with connected(server) as client:
                cut = draw.randrange(1, len(data)) if draw.random() < 0.3 else len(data)
                client.sendall(data[:cut])
                if cut == len(data) and number % 2 == 0:
                    left = draw.randrange(1, 3000)
                    while left > 0 and (more := client.recv(left)):
                        left -= len(more)
                elif draw.random() < 0.5:
                    time.sleep(draw.random() * 0.05)
                if draw.random() < 0.5:  # a reset in place of an end
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    threads = [threading.Thread(target=others), *(threading.Thread(target=leaving, args=(n,)) for n in range(10))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(90)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert server.becomes_idle(10)
    assert answered(server) == expected


def test_one_that_goes_away_ends_its_row_within_a_step(server: Running) -> None:
    for stream in (True, False):
        with connected(server) as client:
            client.sendall(request(json.dumps(body(stream=stream, max_tokens=3000, logit_bias=ENDLESS)).encode()))
            until = time.monotonic() + 10
            while server.pool.places[0].loaded.engine.running == 0 and time.monotonic() < until:
                time.sleep(0.01)
            time.sleep(0.3)
            assert server.pool.places[0].loaded.engine.running == 1
        assert server.becomes_idle(2), "3,000 tokens take longer"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b"null",
        b'"text"',
        b"\xff\xfe\x00",
        b'{"messages": NaN}',
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'{"a":' * 50_000,
        b'{"max_tokens": ' + b"9" * 10_000 + b"}",
        b"",
        b"{}",
    ],
)
def test_bodies_that_are_no_request(server: Running, content: bytes) -> None:
    response = httpx.post(server.url + PATH, content=content, timeout=20)
    assert response.status_code == 400
    assert response.json()["error"]["message"]


@pytest.mark.parametrize(
    "more",
    [
        {"messages": "hi"},
        {"messages": [1]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": [{"role": 5, "content": "hi"}]},
        {"messages": []},
        {"max_tokens": 1.5},
        {"max_tokens": "many"},
        {"max_tokens": -5},
        {"temperature": 10**400},
        {"temperature": "hot"},
        {"top_p": 5},
        {"seed": 2**70},
        {"stop": [5]},
        {"tools": {"a": 1}},
        {"tools": [5]},
        {"logit_bias": {"x": 1}},
        {"logit_bias": {"99999999": 1}},
        {"n": 0},
        {"n": 10**9},
        {"stream": "yes"},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": 5}}}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,x"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "/etc/passwd"}}]}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://a.b/c.png"}}]}]},
    ],
)
def test_wrong_types_and_huge_numbers(server: Running, more: dict[str, Any]) -> None:
    for stream in (False, True):
        asked = body() | {"stream": stream} | more
        response = httpx.post(server.url + PATH, json=asked, timeout=30)
        assert response.status_code == 400, response.text
        error = response.json()["error"]
        assert error["type"] == "invalid_request_error" and "root:" not in error["message"]


def test_null_is_absent_and_half_characters_are_mended(server: Running) -> None:
    asked = dict.fromkeys(("temperature", "top_p", "stop", "tools", "seed", "n", "stream", "logit_bias"))
    assert httpx.post(server.url + PATH, json=body(max_tokens=2) | asked, timeout=30).status_code == 200
    half = json.dumps(body("cut here: \ud83d", max_tokens=2)).encode()
    assert b"\\ud83d" in half
    assert httpx.post(server.url + PATH, content=half, timeout=30).status_code == 200


def test_half_sent_bodies(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BODY_WITHIN", 0.2)
    content = json.dumps(body()).encode()
    with connected(server) as client:
        client.sendall(request(content[:20], len(content)))
        assert answer(client)[0] == 400
    with connected(server) as client:
        client.sendall(request(content[:20], len(content)))
        client.shutdown(socket.SHUT_WR)
        client.recv(1 << 16)
    with connected(server) as client:
        client.sendall(b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localh")
    assert answered(server)


def test_a_body_that_comes_by_drops(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte is in time, and all together are not."""
    monkeypatch.setattr(http, "BODY_WITHIN", 0.5)
    content = json.dumps(body()).encode()
    with connected(server) as client:
        client.sendall(request(b"", len(content)))
        until, got = time.monotonic() + 10, b""
        client.settimeout(0.1)
        for at in range(len(content)):
            client.sendall(content[at : at + 1])
            with contextlib.suppress(TimeoutError):
                got = client.recv(1 << 16, socket.MSG_PEEK)
            if got or time.monotonic() > until:
                break
        client.settimeout(10)
        status, why = answer(client)
    assert status == 400 and b"did not come" in why


@pytest.mark.parametrize("sent", [b"", b"POST " + PATH.encode() + b" HTTP/1.1\r\nHost: localh", b"G"])
def test_heads_that_do_not_come(server: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connection, "HEAD_WITHIN", 0.3)
    with connected(server) as client:
        for at in range(0, len(sent), 10):
            client.sendall(sent[at : at + 10])
            time.sleep(0.02)
        if sent:
            assert answer(client)[0] == 408
        assert client.recv(1) == b""


def test_the_head_of_a_second_request_has_its_time_from_its_first_byte(
    server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_WITHIN", 0.3)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connected(server) as client:
        for _ in range(2):
            client.sendall(whole)
            assert answer(client)[0] == 200
            time.sleep(0.5)  # between two there is another limit
        client.sendall(whole[:20])
        assert answer(client)[0] == 408 and client.recv(1) == b""
    with connected(server) as client:  # and while an answer is made nothing of it counts
        client.sendall(request(json.dumps(body(max_tokens=100, logit_bias=ENDLESS)).encode()))
        assert answer(client)[0] == 200


def test_clients_of_http_1_0_have_a_stream_without_chunks(server: Running) -> None:
    content = json.dumps(body(stream=True)).encode()
    with connected(server) as client:
        client.sendall(request(content).replace(b"HTTP/1.1", b"HTTP/1.0"))
        got = b""
        while more := client.recv(1 << 16):
            got += more
    head, _, said = got.partition(b"\r\n\r\n")
    assert b"transfer-encoding" not in head.lower() and said.startswith(b"data: {") and said.endswith(b"[DONE]\n\n")


def test_bodies_above_the_limit() -> None:
    with running(most_body_bytes=1000) as small:
        assert httpx.post(small.url + PATH, content=b" " * 2000, timeout=10).status_code == 413
        pieces = (b" " * 300 for _ in range(10))  # without a length
        assert httpx.post(small.url + PATH, content=pieces, timeout=10).status_code == 413
        assert httpx.post(small.url + PATH, json=body(max_tokens=1), timeout=30).status_code == 200


def test_a_reader_that_takes_nothing(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """The answer ends, and the row with it. What is between two programs holds megabytes, so the far end is made up."""
    monkeypatch.setattr(http, "SENT_WITHIN", 0.2)
    content = json.dumps(body(stream=True, max_tokens=3500, logit_bias=ENDLESS)).encode()
    taken: list[Any] = []

    async def asked() -> None:
        whole = iter([{"type": "http.request", "body": content}])

        async def receive() -> Any:
            return next(whole, None) or await asyncio.Event().wait()

        async def send(message: Any) -> None:
            taken.append(message)
            if len(taken) > 3:
                await asyncio.Event().wait()

        scope = {"type": "http", "method": "POST", "path": PATH, "headers": []}
        await Endpoint(ChatCompletions(), server.pool, Metrics(), 1 << 20)(scope, receive, send)

    server.call(asked())
    assert len(taken) == 4 and server.becomes_idle(2)


def test_a_model_that_fails_to_load(monkeypatch: pytest.MonkeyPatch) -> None:
    real = pool.Loaded

    def fails(*args: Any, **options: Any) -> Any:
        raise CheckpointError("model.safetensors is damaged: get it again")

    with running() as other:
        other.call(other.pool.unload("demo"))
        monkeypatch.setattr(pool, "Loaded", fails)
        for stream in (False, True):
            response = httpx.post(other.url + PATH, json=body(stream=stream), timeout=20)
            assert response.status_code == 503 and "is damaged" in response.json()["error"]["message"]
        monkeypatch.setattr(pool, "Loaded", real)
        assert answered(other)


def test_a_slow_load_is_told_in_the_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """Headers and signs of life first, then the answer, or the error in the stream."""
    from mlx_qwen35.serving import endpoint, exchange

    real, late = pool.Loaded, threading.Event()

    def slow(*args: Any, **options: Any) -> Any:
        late.wait(5)
        if fail:
            raise CheckpointError("the disk is gone")
        return real(*args, **options)

    with running() as other:
        monkeypatch.setattr(pool, "Loaded", slow)
        monkeypatch.setattr(endpoint, "STATUS_WITHIN", 0.05)
        monkeypatch.setattr(exchange, "ALIVE_EVERY", 0.05)
        for fail in (False, True):
            other.call(other.pool.unload("demo"))
            late.clear()
            with httpx.stream("POST", other.url + PATH, json=body(stream=True), timeout=30) as response:
                assert response.status_code == 200
                lines = (line for line in response.iter_lines() if line.startswith("data: "))
                early = [next(lines) for _ in range(3)]
                assert not late.is_set() and all("choices" in line for line in early)
                late.set()
                rest = list(lines)
            assert ("the disk is gone" in "".join(rest)) == fail
            assert fail or "42" in "".join(
                (json.loads(line[6:])["choices"] or [{}])[0].get("delta", {}).get("content") or ""
                for line in rest
                if "[DONE]" not in line
            )


@pytest.mark.parametrize("kind", ["a file", "no room"])
def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, kind: str) -> None:
    if kind == "a file":
        (tmp_path / "cache").write_text("in the way")
        folder = tmp_path / "cache"
    else:
        folder = Path("/dev/full")
        if not folder.exists():
            pytest.skip("there is no /dev/full")
    with running(cache_dir=folder) as other:
        assert answered(other) == answered(other)


def test_a_disk_that_fills_while_it_is_written_to(tmp_path: Path) -> None:
    """No file may grow beyond 20 KB: what is written breaks off, and is not left."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    text = "kite stone owl " * 40
    with running(cache_dir=tmp_path) as other, pytest.warns(Qwen35Warning, match="larger than a file may be"):
        writing = other.pool.places[0].loaded.engine._worker._store._shelf._behind
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
        try:
            first = answered(other, text)
            writing.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert answered(other, text) == first
    assert not [path.name for path in tmp_path.rglob("*") if path.stat().st_size > 4096]


def test_two_servers_on_one_port(server: Running) -> None:
    with pytest.raises(ServerError, match=f"port {server.server.port} .* is not available"):
        made("demo", port=server.server.port)


def started(*flags: str, **environment: str) -> tuple[subprocess.Popen[str], str]:
    """The command, once it says where it answers -> it, and the address."""
    command = [sys.executable, "-m", "mlx_qwen35", "serve", "--model", "demo", "--port", "0", *flags]
    process = subprocess.Popen(
        command, cwd=CHECKOUT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    line = process.stdout.readline()
    assert line.startswith("http://127.0.0.1:") and "demo" in line, line
    return process, line.split()[0]


@pytest.mark.parametrize("number, stays", [(signal.SIGTERM, True), (signal.SIGINT, False)])
def test_a_signal_in_mid_answer(number: int, stays: bool) -> None:
    """An answer may end in the time that it is given; one that does not is told so."""
    process, url = started("--grace", "20" if stays else "0.3")
    asked = body(stream=True) if stays else body(stream=True, max_tokens=3500, logit_bias=ENDLESS)
    try:
        with httpx.stream("POST", url + PATH, json=asked, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(number)
            rest = "".join(lines)
        assert ('"finish_reason":"stop"' in rest) == stays
        assert stays or '"error"' in rest
        assert process.wait(15) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(url + "/health")
    finally:
        process.kill()
        process.wait(10)


def test_a_second_signal_ends_at_once() -> None:
    process, url = started("--grace", "60", MLX_QWEN35_API_KEY="secret")
    try:
        assert httpx.post(url + PATH, json=body()).status_code == 401
        key = {"x-api-key": "secret"}
        asked = body(stream=True, max_tokens=3500, logit_bias=ENDLESS)
        with httpx.stream("POST", url + PATH, json=asked, headers=key, timeout=30) as response:
            lines = response.iter_lines()  # kept: the connection goes with it
            next(lines)
            process.send_signal(signal.SIGTERM)
            time.sleep(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 130
    finally:
        process.kill()
        process.wait(10)
