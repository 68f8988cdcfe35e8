"""A real server, the demo, and litellm, which passes on what it does not know and adds up streams by itself."""

import asyncio
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.later import later
from tests.serving.questions import PARIS, SUM, WEATHER
from tests.serving.running import Running, running

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # or it asks the web for prices while it is imported
litellm = later("litellm")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


def options(server: Running, messages: Any = SUM, **given: Any) -> dict[str, Any]:
    made = {"model": "openai/demo", "api_base": f"{server.url}/v1", "api_key": "none", "num_retries": 0, "timeout": 60}
    return made | {"messages": messages, "temperature": 0} | given


def test_an_answer(server: Running) -> None:
    made = litellm.completion(**options(server))
    message = made.choices[0].message
    assert message.content == "42" and message.reasoning_content and made.choices[0].finish_reason == "stop"
    assert made.usage.prompt_tokens and made.usage.completion_tokens_details.reasoning_tokens


def test_a_stream(server: Running) -> None:
    chunks = list(litellm.completion(**options(server, stream=True, stream_options={"include_usage": True})))
    whole = litellm.stream_chunk_builder(chunks)
    assert whole.choices[0].message.content == "42" and whole.choices[0].message.role == "assistant"
    assert whole.choices[0].message.reasoning_content and whole.choices[0].finish_reason == "stop"
    assert any(getattr(chunk, "usage", None) and chunk.usage.completion_tokens for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_call(server: Running, stream: bool) -> None:
    made = litellm.completion(**options(server, PARIS, tools=[WEATHER], tool_choice="auto", stream=stream))
    whole = litellm.stream_chunk_builder(list(made)) if stream else made
    [call] = whole.choices[0].message.tool_calls
    assert call.id and call.type == "function" and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    assert whole.choices[0].finish_reason == "tool_calls"


def test_what_it_passes_on(server: Running) -> None:
    body = {"extra_body": {"top_k": 1, "chat_template_kwargs": {"enable_thinking": False}}}
    made = litellm.completion(**options(server, max_tokens=20, **body)).choices[0].message
    assert made.content and not getattr(made, "reasoning_content", None)
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    made = litellm.completion(**options(server, response_format=form)).choices[0].message
    assert isinstance(json.loads(made.content)["ok"], bool)


def test_errors_keep_their_words(server: Running) -> None:
    with pytest.raises(litellm.ContextWindowExceededError, match="maximum context length is 4096"):
        litellm.completion(**options(server, [{"role": "user", "content": "word " * 5000}]))
    with pytest.raises(litellm.BadRequestError, match="top_p"):
        litellm.completion(**options(server, top_p=7))


def test_the_asynchronous_way(server: Running) -> None:
    async def run() -> str:
        stream = await litellm.acompletion(**options(server, stream=True))
        return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(run()) == "42"


def test_text_completion(server: Running) -> None:
    given = options(server, prompt="One, two,", max_tokens=5, model="text-completion-openai/demo")
    del given["messages"]
    made = litellm.text_completion(**given)
    assert made.choices[0].text and made.usage.completion_tokens == 5
