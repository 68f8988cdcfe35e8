"""The real anthropic and openai clients against a server that runs: Messages and Responses, streamed and not."""

import asyncio
import json
import threading

import httpx
import pytest

from mlx_qwen35 import Sampling, load, stream_generate
from mlx_qwen35.sampling.thinking import WORDS
from tests.later import later
from tests.serving.running import running

anthropic = later("anthropic")
openai = later("openai")

ASKED = "What is 17 + 25?"
QUESTION = [{"role": "user", "content": ASKED}]
GREEDY = {"extra_body": {"temperature": 0}}
PARAMETERS = {
    "type": "object",
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
    "required": ["a", "b"],
}
ADD = {"name": "add", "description": "Adds.", "input_schema": PARAMETERS}


@pytest.fixture(scope="module")
def server():
    with running("demo", context_length=2048) as server:
        yield server


@pytest.fixture
def claude(server):
    with anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def gpt(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def own():
    """What the model answers without a server: (reasoning, content, tokens)."""
    parts = list(stream_generate(*load("demo"), ASKED, sampling=Sampling()))
    return "".join(part.reasoning for part in parts), "".join(part.content for part in parts), len(parts)


def test_messages_equal_generate(claude, own):
    made = claude.messages.create(model="claude-opus-5-5", max_tokens=200, messages=QUESTION, **GREEDY)
    thinking, text = made.content
    assert (thinking.thinking, text.text, made.usage.output_tokens) == own
    assert (made.stop_reason, made.role, made.type, made.model) == ("end_turn", "assistant", "message", "demo")
    with claude.messages.stream(model="claude-opus-5-5", max_tokens=200, messages=QUESTION, **GREEDY) as stream:
        told = "".join(stream.text_stream)
        last = stream.get_final_message()
    assert told == own[1] and [block.type for block in last.content] == ["thinking", "text"]
    assert last.content[0].thinking == own[0] and last.content[0].signature
    assert last.usage.input_tokens + last.usage.cache_read_input_tokens == 20 and last.usage.cache_read_input_tokens > 0


def test_tokens_are_counted_as_they_are_used(claude):
    given = {"system": "You are exact.", "messages": QUESTION, "tools": [ADD]}
    counted = claude.messages.count_tokens(model="m", **given).input_tokens
    made = claude.messages.create(model="m", max_tokens=1, **given)
    assert counted == made.usage.input_tokens + made.usage.cache_read_input_tokens > 20
    assert made.stop_reason == "max_tokens"


@pytest.mark.parametrize("streamed", [False, True])
def test_a_turn_with_a_tool(claude, streamed):
    given = {"model": "m", "max_tokens": 300, "tools": [ADD], **GREEDY}
    choice = {"type": "tool", "name": "add"}
    if streamed:
        with claude.messages.stream(messages=QUESTION, tool_choice=choice, **given) as stream:
            made = stream.get_final_message()
    else:
        made = claude.messages.create(messages=QUESTION, tool_choice=choice, **given)
    call = next(block for block in made.content if block.type == "tool_use")
    assert made.stop_reason == "tool_use" and call.name == "add" and {*call.input} == {"a", "b"}
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "42"}]}
    told = [*QUESTION, {"role": "assistant", "content": made.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(messages=told, **given)
    assert after.usage.cache_read_input_tokens >= made.usage.input_tokens and after.content


def test_a_stop_sequence_is_named(claude):
    given = {"model": "m", "max_tokens": 50, "messages": QUESTION, "thinking": {"type": "disabled"}, **GREEDY}
    text = claude.messages.create(**given).content[0].text
    made = claude.messages.create(stop_sequences=["never", text[-1]], **given)
    assert (made.stop_reason, made.stop_sequence) == ("stop_sequence", text[-1])
    with claude.messages.stream(stop_sequences=["never", text[-1]], **given) as stream:
        assert stream.get_final_message().stop_sequence == text[-1]


def test_a_budget_of_thinking(claude):
    thinking = {"type": "enabled", "budget_tokens": 3}
    made = claude.messages.create(model="m", max_tokens=200, messages=QUESTION, thinking=thinking, **GREEDY)
    assert made.content[0].type == "thinking" and WORDS.strip() in made.content[0].thinking


def test_a_form_of_the_answer(claude, gpt):
    schema = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"],
              "additionalProperties": False}  # fmt: skip
    made = claude.messages.create(
        model="m",
        max_tokens=300,
        messages=QUESTION,
        output_config={"format": {"type": "json_schema", "schema": schema}},
    )
    assert isinstance(json.loads(made.content[-1].text)["sum"], int)
    text = {"format": {"type": "json_schema", "name": "sum", "schema": schema, "strict": True}}
    answer = gpt.responses.create(model="m", input=ASKED, max_output_tokens=300, text=text, temperature=0)
    assert isinstance(json.loads(answer.output_text)["sum"], int)


def test_an_error_has_its_class_and_words(claude, gpt):
    long = [{"role": "user", "content": "one two three " * 2000}]
    for stream in (False, True):
        with pytest.raises(anthropic.BadRequestError) as wrong:
            claude.messages.create(model="m", max_tokens=9, messages=long, stream=stream)
        assert "prompt is too long: " in str(wrong.value) and " > 204" in str(wrong.value)
        with pytest.raises(openai.BadRequestError) as refused:
            gpt.responses.create(model="m", input=long, stream=stream)
        assert refused.value.code == "context_length_exceeded"
    assert claude.messages.count_tokens(model="m", messages=long).input_tokens > 2048
    with pytest.raises(anthropic.BadRequestError):
        claude.messages.create(model="m", max_tokens=9, messages=[])
    with pytest.raises(openai.BadRequestError) as lost:
        gpt.responses.create(model="m", input="Hi", previous_response_id="resp_nowhere")
    assert lost.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        gpt.responses.retrieve("resp_nowhere")


def test_a_key_is_asked_for_in_both_ways():
    with running("demo", api_key="secret") as server:
        for header in ({"authorization": "Bearer secret"}, {"x-api-key": "secret"}, {}):
            body = {"max_tokens": 1, "messages": QUESTION}
            answer = httpx.post(f"{server.url}/v1/messages", json=body, headers=header, timeout=60)
            assert answer.status_code == (200 if header else 401)
        assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "authentication_error"


def test_responses_equal_generate(gpt, own):
    made = gpt.responses.create(model="m", input=ASKED, temperature=0, reasoning={"summary": "auto"})
    reasoning, message = made.output
    assert (reasoning.content[0].text, made.output_text, made.usage.output_tokens) == own
    assert reasoning.summary[0].text == own[0] and message.status == made.status == "completed"
    with gpt.responses.stream(model="m", input=ASKED, temperature=0) as stream:
        kinds = [event.type for event in stream]
        last = stream.get_final_response()
    assert last.output_text == own[1] and last.usage.input_tokens_details.cached_tokens > 0
    assert kinds[:2] == ["response.created", "response.in_progress"] and kinds[-1] == "response.completed"


def test_a_conversation_is_kept(gpt):
    first = gpt.responses.create(model="m", input=ASKED, temperature=0)
    second = gpt.responses.create(model="m", input="And 2 more?", previous_response_id=first.id, temperature=0)
    assert second.usage.input_tokens > first.usage.input_tokens + first.usage.output_tokens - 5
    assert second.usage.input_tokens_details.cached_tokens > 0
    shown = gpt.responses.retrieve(first.id)
    assert shown.output_text == first.output_text and shown.id == first.id
    gpt.responses.delete(first.id)
    for call in (gpt.responses.retrieve, gpt.responses.delete):
        with pytest.raises(openai.NotFoundError):
            call(first.id)
    third = gpt.responses.create(model="m", input="Why?", previous_response_id=second.id, max_output_tokens=5)
    assert third.status == "incomplete" and third.usage.input_tokens > second.usage.input_tokens


@pytest.mark.parametrize("streamed", [False, True])
def test_a_function_is_called(gpt, streamed):
    tool = {"type": "function", "name": "add", "parameters": PARAMETERS, "strict": True}
    given = {"model": "m", "input": ASKED, "tools": [tool], "tool_choice": "required", "temperature": 0}
    if streamed:
        with gpt.responses.stream(parallel_tool_calls=False, max_output_tokens=500, **given) as stream:
            made = stream.get_final_response()
    else:
        made = gpt.responses.create(parallel_tool_calls=False, max_output_tokens=500, **given)
    call = next(item for item in made.output if item.type == "function_call")
    assert call.name == "add" and {*json.loads(call.arguments)} == {"a", "b"}
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    after = gpt.responses.create(model="m", input=[output], previous_response_id=made.id, tools=[tool], temperature=0)
    assert after.status == "completed" and after.usage.input_tokens_details.cached_tokens > 0


def test_log_probabilities_are_those_of_the_text(gpt):
    given = {"model": "m", "input": ASKED, "temperature": 0, "top_logprobs": 2}
    include = ["message.output_text.logprobs"]
    made = gpt.responses.create(include=include, **given)
    part = made.output[-1].content[0]
    assert "".join(each.token for each in part.logprobs) == part.text
    assert all(each.logprob <= 0 and len(each.top_logprobs) == 2 for each in part.logprobs)
    with gpt.responses.stream(include=include, **given) as stream:
        told = stream.get_final_response().output[-1].content[0]
    assert [each.token for each in told.logprobs] == [each.token for each in part.logprobs]


def test_a_client_who_leaves_ends_the_answer(server, claude):
    with claude.messages.stream(model="m", max_tokens=1500, messages=QUESTION, extra_body={"temperature": 2}) as stream:
        next(iter(stream))
    assert server.becomes_idle()

    async def leave() -> None:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="any", max_retries=0) as client:
            asked = client.messages.create(model="m", max_tokens=1500, messages=QUESTION, extra_body={"temperature": 2})
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(asked, 0.2)

    asyncio.run(leave())
    assert server.becomes_idle()


def test_several_at_once_have_their_own_answers(claude, gpt, own):
    texts = []

    def ask(at):
        if at % 2:
            made = claude.messages.create(model="m", max_tokens=200, messages=QUESTION, **GREEDY)
            texts.append((made.content[0].thinking, made.content[1].text))
        else:
            answer = gpt.responses.create(model="m", input=ASKED, temperature=0)
            texts.append((answer.output[0].content[0].text, answer.output_text))

    threads = [threading.Thread(target=ask, args=(at,)) for at in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert texts == [own[:2]] * 8
