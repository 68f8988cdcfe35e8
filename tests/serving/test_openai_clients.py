"""A real server, the demo, and OpenAI's own client: sync, async, its helpers; streamed and not."""

import asyncio
import base64
import io
import json
from collections.abc import Iterator
from typing import Any, Literal

import pytest
from PIL import Image, ImageDraw

from mlx_qwen35 import Sampling, load
from mlx_qwen35.generation import stream_generate
from tests.later import later
from tests.serving.questions import PARIS, SUM, WEATHER
from tests.serving.running import Running, running

openai = later("openai")
pydantic = pytest.importorskip("pydantic")


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[Any]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


def ask(client: Any, messages: Any = SUM, **options: Any) -> Any:
    return client.chat.completions.create(model="demo", messages=messages, **options)


def test_an_answer_is_that_of_generate(client: Any) -> None:
    told = ask(client, temperature=0, logprobs=True, top_logprobs=3)
    model, processor = load()
    options: dict[str, Any] = {"sampling": Sampling(temperature=0), "logprobs": True, "top_logprobs": 3}
    parts = list(stream_generate(model, processor, SUM, **options))
    choice, message = told.choices[0], told.choices[0].message
    assert message.content == "".join(part.content for part in parts) == "42"
    assert message.reasoning_content == message.reasoning == "".join(part.reasoning for part in parts) != ""
    assert choice.finish_reason == "stop"
    assert [one.bytes for one in choice.logprobs.content] == [
        list(processor.tokenizer.token_bytes(part.token)) for part in parts
    ]
    assert [one.logprob for one in choice.logprobs.content] == pytest.approx([part.logprob for part in parts], abs=1e-4)
    assert all(len(one.top_logprobs) == 3 for one in choice.logprobs.content)
    assert told.usage.completion_tokens == len(parts) == len(choice.logprobs.content)
    assert told.usage.completion_tokens_details.reasoning_tokens > 3


def test_a_stream_has_what_the_whole_has(client: Any) -> None:
    options: dict[str, Any] = {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = ask(client, **options)
    *chunks, usage = ask(client, stream=True, stream_options={"include_usage": True}, **options)
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert "".join(delta.content or "" for delta in deltas) == whole.choices[0].message.content
    reasoning = [getattr(delta, "reasoning_content", None) or "" for delta in deltas]
    assert "".join(reasoning) == whole.choices[0].message.reasoning_content
    told = [one for chunk in chunks if chunk.choices[0].logprobs for one in chunk.choices[0].logprobs.content]
    assert [one.token for one in told] == [one.token for one in whole.choices[0].logprobs.content]
    assert [delta.role for delta in deltas if delta.role] == ["assistant"]
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert usage.choices == [] and usage.usage.total_tokens == whole.usage.total_tokens
    assert usage.usage.prompt_tokens_details.cached_tokens > 0


def test_calls_go_round(client: Any) -> None:
    first = ask(client, PARIS, tools=[WEATHER], temperature=0)
    choice = first.choices[0]
    assert choice.finish_reason == "tool_calls"
    [call] = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"city": "Paris", "days": 3})
    result = {"role": "tool", "tool_call_id": call.id, "content": [{"type": "text", "text": '{"sky": "rain"}'}]}
    history = [*PARIS, choice.message, result]
    then = ask(client, history, tools=[WEATHER], temperature=0)
    assert then.choices[0].message.content and then.choices[0].finish_reason == "stop"
    assert then.usage.prompt_tokens_details.cached_tokens > 50


def test_calls_in_a_stream(client: Any) -> None:
    chunks = list(ask(client, PARIS, tools=[WEATHER], temperature=0, stream=True))
    calls = [chunk.choices[0].delta.tool_calls[0] for chunk in chunks if chunk.choices[0].delta.tool_calls]
    assert calls[0].id and calls[0].type == "function" and calls[0].function.name == "get_weather"
    assert all(call.id is None and call.function.name is None and call.index == 0 for call in calls[1:])
    assert json.loads("".join(call.function.arguments for call in calls)) == {"city": "Paris", "days": 3}
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("choice", "called"),
    [("required", True), ("none", False), ({"type": "function", "function": {"name": "get_weather"}}, True)],
    ids=str,
)
def test_the_choice_is_kept(client: Any, choice: Any, called: bool) -> None:
    question = PARIS if choice == "none" else [{"role": "user", "content": "Hello"}]
    made = ask(client, question, tools=[WEATHER], tool_choice=choice, max_tokens=150, seed=1).choices[0]
    assert bool(made.message.tool_calls) is called
    if called:
        arguments = json.loads(made.message.tool_calls[0].function.arguments)
        assert set(arguments) == {"city", "days"} and isinstance(arguments["days"], int)


class Sum(pydantic.BaseModel):
    sign: Literal["+", "-"]
    large: bool


def test_a_form_is_parsed(client: Any) -> None:
    made = client.chat.completions.parse(model="demo", messages=SUM, response_format=Sum, temperature=0)
    assert isinstance(made.choices[0].message.parsed, Sum)
    with client.chat.completions.stream(model="demo", messages=SUM, response_format=Sum, temperature=0) as stream:
        for _ in stream:
            pass
        assert isinstance(stream.get_final_completion().choices[0].message.parsed, Sum)


def test_an_object_of_json(client: Any) -> None:
    made = ask(client, response_format={"type": "json_object"}, max_tokens=60, seed=3).choices[0]
    if made.finish_reason == "stop":
        assert isinstance(json.loads(made.message.content), dict)
    else:
        assert made.message.content.lstrip().startswith("{")


def test_the_stream_helper(client: Any) -> None:
    class get_weather(pydantic.BaseModel):  # noqa: N801 - the tool's name
        city: str
        days: int

    tool = openai.pydantic_function_tool(get_weather, description="Get the weather.")
    kinds = []
    with client.chat.completions.stream(model="demo", messages=PARIS, tools=[tool], temperature=0) as stream:
        for event in stream:
            kinds.append(event.type)
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= set(kinds)
    message = final.choices[0].message
    assert message.role == "assistant"
    assert message.tool_calls[0].function.parsed_arguments == get_weather(city="Paris", days=3)
    assert message.reasoning_content and message.reasoning_content == message.reasoning


def test_the_asynchronous_client(server: Running) -> None:
    async def run() -> tuple[list[str], str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            texts = await asyncio.gather(*(self_contained(client, stream) for stream in (True, False) * 4))
            return texts, (await client.models.retrieve("demo")).id

    async def self_contained(client: Any, stream: bool) -> str:
        made = await client.chat.completions.create(model="demo", messages=SUM, temperature=0, stream=stream)
        if not stream:
            return made.choices[0].message.content
        return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

    texts, name = asyncio.run(run())
    assert texts == ["42"] * 8 and name == "demo"


def test_what_is_drawn_can_be_steered(client: Any) -> None:
    off: dict[str, Any] = {"extra_body": {"enable_thinking": False}, "max_tokens": 12}
    first, second = (ask(client, temperature=1.5, seed=11, n=2, **off) for _ in range(2))
    texts = [[choice.message.content for choice in made.choices] for made in (first, second)]
    assert texts[0] == texts[1] and len(texts[0]) == 2
    eight = ask(client, temperature=0, logprobs=True, **off).choices[0].logprobs.content[0]
    _, processor = load()
    [banned] = processor.tokenizer.encode(eight.token)
    other = ask(client, temperature=0, logit_bias={str(banned): -100}, **off).choices[0].message.content
    assert not other.startswith(eight.token)
    forced = ask(client, temperature=0, logit_bias={str(banned): 100}, **off).choices[0]
    assert set(forced.message.content) == {eight.token} and forced.finish_reason == "length"
    tired = ask(client, temperature=0, logit_bias={str(banned): 100}, frequency_penalty=40, **off).choices[0]
    assert 2 <= tired.message.content.count(eight.token) <= 4
    whole = ask(client, PARIS, temperature=0, **off).choices[0].message.content
    stopped = ask(client, PARIS, temperature=0, stop=[whole[2:4]], **off).choices[0]
    assert stopped.message.content == whole[:2].rstrip() and stopped.finish_reason == "stop"
    effort = ask(client, temperature=0, reasoning_effort="none").choices[0].message
    assert effort.content and not hasattr(effort, "reasoning_content")


def test_a_budget_ends_the_reasoning(client: Any) -> None:
    made = ask(client, temperature=0, extra_body={"thinking_budget": 3})
    message = made.choices[0].message
    assert message.content and message.reasoning.startswith("7+5\n\nConsidering the limited time")
    assert ask(client, max_completion_tokens=1).choices[0].finish_reason == "length"


def test_a_picture(client: Any) -> None:
    image = Image.new("RGB", (64, 64), "black")
    ImageDraw.Draw(image).ellipse((14, 14, 50, 50), fill=(220, 40, 40))
    file = io.BytesIO()
    image.save(file, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What do you see?"}]
    made = ask(client, [{"role": "user", "content": content}], temperature=0, reasoning_effort="none")
    assert "circle" in made.choices[0].message.content


def test_errors_have_their_class_and_words(client: Any) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, [{"role": "user", "content": "word " * 5000}])
    assert error.value.code == "context_length_exceeded" and "maximum context length is 4096" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, temperature=-2)
    assert error.value.param == "temperature" and error.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, logit_bias={"99999999": 1}, stream=True)
    assert "99999999" in error.value.message
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "odd"}}})
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("nothing/such")
    assert error.value.code == "model_not_found"


def test_one_model_answers_to_every_name(client: Any) -> None:
    made = client.chat.completions.create(model="gpt-9", messages=SUM, temperature=0)
    assert made.model == "demo" and made.choices[0].message.content == "42"
    assert [model.id for model in client.models.list()] == ["demo"]


def test_a_client_that_leaves_frees_the_model(client: Any, server: Running) -> None:
    _, processor = load()
    tokens = {str(token): 90 for token in processor.tokenizer.encode(" and")}
    with ask(client, stream=True, logit_bias=tokens) as stream:
        for _ in zip(range(5), stream, strict=False):
            pass
        assert not server.idle
    assert server.becomes_idle()
    with client.completions.create(model="demo", prompt=["a", "b"], stream=True, logit_bias=tokens) as stream:
        for _ in zip(range(5), stream, strict=False):
            pass
        assert not server.idle
    assert server.becomes_idle()
    with pytest.raises(openai.BadRequestError):  # one of several is wrong: none goes on
        client.completions.create(model="demo", prompt=[[5], [10**8]], logit_bias=tokens)
    assert server.becomes_idle()


def test_completions(client: Any) -> None:
    prompt = "<|im_start|>user\nWhat is 17 + 25?<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    options: dict[str, Any] = {"model": "demo", "temperature": 0}
    made = client.completions.create(prompt=prompt, logprobs=2, **options)
    answer = made.choices[0].text
    assert answer.isdigit() and made.choices[0].finish_reason == "stop"
    assert "".join(made.choices[0].logprobs.tokens).startswith(answer)
    _, processor = load()
    ids = processor.tokenizer.encode(prompt)
    both = client.completions.create(prompt=[prompt, list(ids)], echo=True, **options)
    assert [choice.text for choice in both.choices] == [prompt + answer] * 2
    assert both.usage.prompt_tokens == 2 * made.usage.prompt_tokens
    written = ["", ""]
    for chunk in client.completions.create(prompt=[prompt, "One, two,"], max_tokens=6, stream=True, **options):
        written[chunk.choices[0].index] += chunk.choices[0].text
    assert written[0] == answer and written[1]
