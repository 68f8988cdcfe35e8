"""The whole server: whose words an error has, what is counted and logged, and how it is started."""

import json
import logging
import math
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

import mlx_qwen35
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import ArgumentError, Qwen35Error
from mlx_qwen35.serving.server import made
from tests.blocks import published, tensors, write
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT
from tests.serving.running import Running, running

SECRET = "zebra"
ASKED = {"model": "gpt-9", "messages": [{"role": "user", "content": f"Reverse these words: {SECRET}, owl"}]}
SHORT = ASKED | {"max_tokens": 8}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running(api_key="key", cors=["http://a.example"], parallel=2) as made:
        yield made


@pytest.fixture
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers={"x-api-key": "key"}, timeout=60) as made:
        yield made


def test_errors_have_the_words_of_their_interface(server: Running, client: httpx.Client) -> None:
    def error(response: httpx.Response, status: int) -> dict:
        assert response.status_code == status
        return response.json()

    bare = httpx.Client(base_url=server.url)
    for answer in (bare.post("/v1/messages", json={}), bare.post("/v1/messages/count_tokens", json={})):
        told = error(answer, 401)
        assert told["type"] == "error" and told["error"]["type"] == "authentication_error"
    assert isinstance(error(bare.post("/api/chat", json={}), 401)["error"], str)
    assert error(bare.post("/v1/chat/completions", json={}), 401)["error"]["message"]
    assert "message" in error(bare.get("/api/v1/models"), 401)["error"]
    told = error(client.get("/v1/messages"), 405)
    assert told["type"] == "error" and "POST" in told["error"]["message"]
    assert client.get("/v1/messages").headers["allow"] == "POST"
    assert error(client.get("/v1/nothing"), 404)["error"]["message"]
    assert error(client.post("/v1/messages", content=b"{"), 400)["error"]["type"] == "invalid_request_error"
    bare.close()


def test_every_interface_answers(client: httpx.Client) -> None:
    one = {"model": "any", "max_tokens": 4}
    messages = ASKED["messages"]
    for path, asked in (
        ("/v1/chat/completions", {**one, "messages": messages}),
        ("/api/v0/chat/completions", {**one, "messages": messages}),
        ("/v1/completions", {**one, "prompt": "What"}),
        ("/v1/responses", {"model": "any", "max_output_tokens": 4, "input": "What is 17 + 25?"}),
        ("/v1/messages", {**one, "messages": messages}),
        ("/v1/messages/count_tokens", {"model": "any", "messages": messages}),
        ("/api/v1/chat", {"model": "any", "max_output_tokens": 4, "input": "What is 17 + 25?"}),
        ("/api/chat", {"model": "any", "messages": messages, "stream": False, "options": {"num_predict": 4}}),
        ("/api/generate", {"model": "any", "prompt": "What", "stream": False, "options": {"num_predict": 4}}),
    ):
        response = client.post(path, json=asked)
        assert response.status_code == 200, (path, response.text)
    for path in ("/v1/models", "/v1/models/demo", "/api/v0/models", "/api/v1/models", "/api/tags", "/api/version"):
        response = client.get(path)
        assert response.status_code == 200, (path, response.text)
    assert "demo" in client.get("/v1/models").text


def test_health_needs_no_key_and_the_rest_does(server: Running) -> None:
    assert httpx.get(server.url + "/health").json()["status"] == "ok"
    assert httpx.get(server.url + "/metrics").status_code == 401


def test_the_page_runs_nothing_from_elsewhere(server: Running) -> None:
    page = httpx.get(server.url + "/")
    assert page.status_code == 200 and page.headers["content-type"].startswith("text/html")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert page.headers["x-content-type-options"] == "nosniff"


def test_a_page_that_may_ask(client: httpx.Client) -> None:
    origin = {"origin": "http://a.example"}
    response = client.post("/v1/chat/completions", json=SHORT, headers=origin)
    assert response.status_code == 200 and response.headers["access-control-allow-origin"] == "http://a.example"
    asking = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "x-api-key"}
    assert httpx.options(str(client.base_url) + "/v1/chat/completions", headers=asking).status_code == 204
    assert client.get("/v1/models", headers={"origin": "http://b.example"}).status_code == 403
    assert client.get("/v1/models", headers={"host": "evil.example"}).status_code == 403


def test_what_is_logged(client: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    """A line a request, with counts, and nothing that was said."""
    with caplog.at_level(logging.DEBUG, "mlx_qwen35"):
        for stream in (False, True):
            client.post("/v1/chat/completions?x=" + SECRET, json=SHORT | {"stream": stream, "zzz": SECRET})
        client.post("/v1/chat/completions", json=SHORT | {"temperature": SECRET})
        client.get("/nothing")
    said = caplog.text
    assert SECRET not in said and "owl" not in said
    lines = [record.getMessage() for record in caplog.records]
    done = [line for line in lines if line.startswith("POST /v1/chat/completions 200 demo ")]
    assert len(done) == 2 and all("+8 tokens" in line and line.endswith("length") for line in done)
    assert any(line.startswith("POST /v1/chat/completions 400") for line in lines)
    assert any("fields ignored: zzz" in line for line in lines)


def counted(client: httpx.Client) -> dict[str, float]:
    response = client.get("/metrics")
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = [line for line in response.text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_what_is_counted(client: httpx.Client) -> None:
    before = counted(client)
    for stream in (False, True):
        client.post("/v1/chat/completions", json=SHORT | {"stream": stream})
    client.post("/v1/chat/completions", json={})
    after = counted(client)

    def more(name: str) -> float:
        return after[f"mlx_qwen35_{name}"] - before.get(f"mlx_qwen35_{name}", 0)

    assert more('requests_total{path="/v1/chat/completions",status="200"}') == 2
    assert more('requests_total{path="/v1/chat/completions",status="400"}') == 1
    assert more("answer_tokens_total") == 16 and more("first_token_seconds_count") == 2
    assert 0 < more("cached_tokens_total") < more("prompt_tokens_total")
    assert after['mlx_qwen35_requests_running{model="demo"}'] == 0
    assert after['mlx_qwen35_weight_bytes{model="demo"}'] > 10**7
    assert after['mlx_qwen35_cache_bytes{model="demo"}'] > 0
    buckets = [value for name, value in after.items() if "_bucket" in name]
    assert buckets == sorted(buckets) and math.isclose(buckets[-1], after["mlx_qwen35_first_token_seconds_count"])


def test_more_than_may_wait() -> None:
    """429 with Retry-After; those that were let in are answered."""
    with running(parallel=1, most_waiting=1) as small:
        with ThreadPoolExecutor(6) as threads:
            asked = ASKED | {"max_tokens": 40, "logit_bias": {"991": -100, "993": -100}}
            url = small.url + "/v1/chat/completions"
            answers = list(threads.map(lambda _: httpx.post(url, json=asked, timeout=60), range(6)))
        statuses = sorted(answer.status_code for answer in answers)
        assert statuses.count(200) >= 2 and 429 in statuses and set(statuses) == {200, 429}
        assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
        assert small.becomes_idle(2)


def test_streams_are_events(client: httpx.Client) -> None:
    with client.stream("POST", "/v1/chat/completions", json=SHORT | {"stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-cache"
        lines = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    reasons = [json.loads(line)["choices"][0]["finish_reason"] for line in lines[:-1]]
    assert [reason for reason in reasons if reason] == ["length"]


@pytest.mark.parametrize(
    "options, says",
    [
        ({"host": "0.0.0.0"}, "api_key"),
        ({"port": 70000}, "port"),
        ({"ttl": -1}, "ttl"),
        ({"grace": -1}, "grace"),
        ({"parallel": 0}, "parallel"),
        ({"nonsense": 1}, "nonsense"),
        ({"host": "256.1.1.1", "api_key": "k"}, "--host"),
    ],
)
def test_what_cannot_be_served(options: dict, says: str) -> None:
    with pytest.raises(Qwen35Error, match=says):
        made("demo", **{"port": 0, **options})


def test_others_are_let_in_when_that_is_said_twice() -> None:
    server = made("demo", host="0.0.0.0", port=0, allow_anyone=True)
    server._socket.close()
    assert issubclass(ArgumentError, ValueError) and mlx_qwen35.serve.__module__ == "mlx_qwen35.serving.server"


def test_the_command_refuses_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["--model", "no-such-model"], ["--host", "0.0.0.0"], ["--kv-group-size", "32"]):
        assert main(["serve", "--port", "0", *argv]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


def test_a_first_model_that_cannot_be_loaded(tmp_path: Path) -> None:
    config = tiny_config()
    folder = write_checkpoint(tmp_path / "model", config, random_tensors(config))
    drafter = write(tmp_path / "drafter", published(), tensors(published()))
    for model, options, says in (
        (folder, {}, "tokenizer.json is missing"), (drafter, {}, "Give the model that it drafts for"),
        ("demo", {"memory": "10MB"}, "does not fit into"),
    ):  # fmt: skip
        with pytest.raises(Qwen35Error, match=says):
            mlx_qwen35.serve(model, port=0, **options)


def test_what_to_install_is_said() -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        "from mlx_qwen35.cli.main import main; sys.exit(main(['serve', '--model', 'demo', '--port', '0']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "pip install starlette uvicorn" in done.stderr and "Traceback" not in done.stderr
