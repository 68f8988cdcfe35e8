"""Through whichever interface a question comes, alone or among sixteen: its answer is the one that Python gives."""

import asyncio
import json

import httpx
import pytest

from mlx_qwen35 import Sampling, generate_batch, load
from tests.serving.running import running
from tests.soak import examples

TOOL = {
    "name": "add",
    "description": "Add two numbers.",
    "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}
QUESTIONS = (
    "What is 17 + 25?",
    "Sort these words: queen, jacket, violin",
    "Reverse these words: stone, apple, lamp",
    "Hi!",
)
SAMPLINGS = ({"temperature": 0.0}, {"temperature": 0.9, "top_p": 0.9, "seed": 5})
MOST = 40


@pytest.fixture(scope="module")
def demo():
    return load()


@pytest.fixture(scope="module")
def url():
    with running(parallel=8) as server:
        yield server.url


def chat(question, system, tools, sampling, stream):
    messages = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*messages, {"role": "user", "content": question}], "max_tokens": MOST, "stream": stream}
    body |= sampling | ({"tools": [{"type": "function", "function": TOOL}]} if tools else {})
    return "/v1/chat/completions", body


def read_chat(whole, events):
    if whole:
        message = whole["choices"][0]["message"]
        return message.get("reasoning_content") or "", message["content"] or ""
    deltas = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    return tuple("".join(delta.get(name) or "" for delta in deltas) for name in ("reasoning_content", "content"))


def responses(question, system, tools, sampling, stream):
    body = {"input": question, "max_output_tokens": MOST, "stream": stream, "store": False} | sampling
    body |= {"instructions": system} if system else {}
    body |= {"tools": [{"type": "function", **TOOL}]} if tools else {}
    return "/v1/responses", body


def read_responses(whole, events):
    whole = whole or next(e["response"] for e in events if e["type"] in ("response.completed", "response.incomplete"))
    parts = [(item["type"], part["text"]) for item in whole["output"] for part in item.get("content") or ()]
    return tuple("".join(text for kind, text in parts if kind == wanted) for wanted in ("reasoning", "message"))


def messages(question, system, tools, sampling, stream):
    body = {"messages": [{"role": "user", "content": question}], "max_tokens": MOST, "stream": stream} | sampling
    body |= {"system": system} if system else {}
    tool = {"name": TOOL["name"], "description": TOOL["description"], "input_schema": TOOL["parameters"]}
    return "/v1/messages", body | ({"tools": [tool]} if tools else {})


def read_messages(whole, events):
    if whole:
        blocks = whole["content"]
    else:
        blocks = [event["delta"] for event in events if event["type"] == "content_block_delta"]
    return tuple("".join(block.get(name) or "" for block in blocks) for name in ("thinking", "text"))


def ollama(question, system, tools, sampling, stream):
    before = [{"role": "system", "content": system}] if system else []
    body = {"messages": [*before, {"role": "user", "content": question}], "stream": stream}
    body |= {"options": sampling | {"num_predict": MOST}}
    return "/api/chat", body | ({"tools": [{"type": "function", "function": TOOL}]} if tools else {})


def read_ollama(whole, events):
    said = [each["message"] for each in ([whole] if whole else events) if "message" in each]
    return tuple("".join(message.get(name) or "" for message in said) for name in ("thinking", "content"))


APIS = {
    "chat": (chat, read_chat),
    "responses": (responses, read_responses),
    "messages": (messages, read_messages),
    "ollama": (ollama, read_ollama),
}


async def asked(client, api, *what):
    path, body = APIS[api][0](*what)
    answer = await client.post(path, json={"model": "demo", **body})
    assert answer.status_code == 200, answer.text
    if not what[-1]:
        return APIS[api][1](answer.json(), None)
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines()]
    return APIS[api][1](None, [json.loads(line) for line in lines if line.startswith("{")])


@pytest.fixture(scope="module")
def expected(demo):
    """expected(question, system, tools, sampling) -> what Python gives, (reasoning, content); computed once."""
    known = {}

    def expected(question, system, tools, sampling):
        key = question, system, tools, *sampling.items()
        if key not in known:
            made = Sampling.from_generation_config(demo[1].generation_config, **sampling)
            given = {"tools": [{"type": "function", "function": TOOL}]} if tools else {}
            (answer,) = generate_batch(*demo, [question], system=system, max_tokens=MOST, sampling=made, **given)
            known[key] = answer.reasoning, answer.content
        return known[key]

    return expected


def kinds(api):
    for number in range(8):
        sampling = SAMPLINGS[number % 2] if api != "messages" else SAMPLINGS[0]  # Anthropic's has no seed
        yield QUESTIONS[number % 4], (None, "Answer in one word.")[number // 4], number % 3 == 0, sampling


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", APIS)
def test_one_at_a_time(expected, url, api, stream):
    some = [*kinds(api)]
    if stream and examples(len(some), 2, least=4) < len(some):
        some = [some[number] for number in (1, 3, 4, 6)]  # each question, each sampling, with and without a system

    async def work():
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            return [await asked(client, api, *kind, stream) for kind in some]

    for kind, found in zip(some, asyncio.run(work()), strict=True):
        assert found == expected(*kind), kind


def test_sixteen_at_once(expected, url):
    what = [(api, kind, bool(number % 2)) for api in APIS for number, kind in enumerate(kinds(api)) if number % 2]

    async def work():
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            return await asyncio.gather(*(asked(client, api, *kind, stream) for api, kind, stream in what))

    assert len(what) == 16
    for (api, kind, _), found in zip(what, asyncio.run(work()), strict=True):
        assert found == expected(*kind), (api, kind)
