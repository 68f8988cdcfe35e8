"""Ollama's and LM Studio's interfaces end to end: the real server with the demo, the `ollama` client, and httpx."""

from __future__ import annotations

import json
from collections.abc import Iterator

import httpx
import ollama
import pytest

from tests.serving.running import Running, running

SUM = {"role": "user", "content": "What is 867 + 821?"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {"type": "integer"}}}},
}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Running) -> ollama.Client:
    return ollama.Client(host=server.url, timeout=30)


@pytest.fixture(scope="module")
def http(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30, trust_env=False) as made:
        yield made


def test_the_client_chats_with_and_without_a_stream(client: ollama.Client) -> None:
    whole = client.chat("demo", [SUM], options={"temperature": 0})
    assert whole.message.content == "1688" and "7+1=8" in whole.message.thinking and whole.done_reason == "stop"
    assert whole.prompt_eval_count > 0 and whole.eval_count > 0 and whole.eval_duration > 0
    parts = list(
        client.chat("demo:latest", [SUM], stream=True, tools=[TOOL], options={"temperature": 0, "num_ctx": 4096})
    )
    assert parts[-1].done and not any(part.done for part in parts[:-1]) and len(parts) > 3
    plain = client.chat("demo", [SUM], think=False)
    assert not plain.message.thinking and plain.message.content


def test_the_client_generates_and_asks_for_a_form(client: ollama.Client) -> None:
    assert client.generate("demo", SUM["content"]).response == "1688"
    raw = client.generate("demo", "<|im_start|>user\nHi<|im_end|>\n", raw=True, options={"num_predict": 3})
    assert raw.eval_count == 3 and raw.done_reason == "length"
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    made = client.chat("demo", [SUM], think=False, format=schema, options={"num_predict": 60})
    if made.done_reason == "stop":
        assert isinstance(json.loads(made.message.content)["n"], int)
    else:
        assert made.message.content.startswith("{")


def test_the_client_lists_loads_and_unloads(client: ollama.Client) -> None:
    assert "demo:latest" in [each.model for each in client.list().models]
    shown = client.show("demo")
    assert {"completion", "tools", "thinking", "vision"} <= set(shown.capabilities)
    loaded = client.generate("demo", "", keep_alive="10m")
    assert loaded.done_reason == "load" and [each.model for each in client.ps().models] == ["demo:latest"]
    assert client.generate("demo", "", keep_alive=0).done_reason == "unload"
    assert client.ps().models == []
    with pytest.raises(ollama.ResponseError, match="options.temperature"):
        client.chat("demo", [SUM], options={"temperature": "hot"})


def test_lm_studios_interface_streams_and_goes_on(http: httpx.Client) -> None:
    with http.stream("POST", "/api/v1/chat", json={"model": "demo", "input": SUM["content"], "stream": True}) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        names = [line.removeprefix("event: ") for line in answer.iter_lines() if line.startswith("event: ")]
    steps = list(dict.fromkeys(name for name in names if not name.startswith("model_load")))
    assert steps[0] == "chat.start" and steps[-1] == "chat.end" and "prompt_processing.end" in steps
    assert steps.index("reasoning.end") < steps.index("message.start") < steps.index("message.end")
    first = http.post("/api/v1/chat", json={"model": "demo", "input": SUM["content"]}).json()
    assert first["output"][-1] == {"type": "message", "content": "1688"}
    body = {
        "model": "demo",
        "input": "What is 1 + 1?",
        "previous_response_id": first["response_id"],
        "reasoning": "off",
    }
    second = http.post("/api/v1/chat", json=body).json()
    assert second["stats"]["input_tokens"] > first["stats"]["input_tokens"]
    assert [each["type"] for each in second["output"]] == ["message"]


def test_lm_studios_interface_loads_and_unloads(http: httpx.Client) -> None:
    loaded = http.post("/api/v1/models/load", json={"model": "demo", "echo_load_config": True}).json()
    assert loaded["status"] == "loaded" and loaded["load_config"]["context_length"] > 0
    models = http.get("/api/v1/models").json()["models"]
    assert [each["loaded_instances"][0]["id"] for each in models if each["key"] == "demo"] == ["demo"]
    assert http.get("/api/v0/models/demo").json()["state"] == "loaded"
    assert http.post("/api/v1/models/unload", json={"instance_id": "demo"}).json() == {"instance_id": "demo"}
    assert http.get("/api/v0/models/demo").json()["state"] == "not-loaded"
    older = http.post("/api/v0/chat/completions", json={"model": "demo", "messages": [SUM], "temperature": 0}).json()
    assert older["choices"][0]["message"]["content"] == "1688"
    refused = http.post("/api/v1/models/download", json={"model": "x/y"})
    assert refused.status_code == 400 and "mlx-qwen35" in refused.json()["error"]["message"]
    unknown = http.get("/api/v0/models/other")
    assert unknown.status_code == 404 and unknown.json()["error"]["type"] == "model_not_found"


def test_errors_are_in_each_interfaces_words(http: httpx.Client) -> None:
    assert isinstance(http.post("/api/chat", content=b"{").json()["error"], str)
    assert isinstance(http.get("/api/nothing").json()["error"], str)
    told = http.post("/api/v1/chat", json={"input": 3})
    assert told.status_code == 400 and told.json()["error"]["param"] == "input"
