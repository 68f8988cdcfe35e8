"""POST /v1/completions: what a body asks, and the answers, against the types of the openai package."""

from typing import Any

import pytest

from mlx_qwen35.serving.apis.openai_completions import MOST_PROMPTS, Completions
from mlx_qwen35.serving.exchange import Alive
from mlx_qwen35.serving.refusal import Refusal
from tests.serving.fake import Fake, answered, ends, events, part, read, says, streamed, thinks

API = Completions()


def asked(**fields: Any) -> Any:
    return read(API, {"model": "demo", "prompt": "Once"} | fields)


def chunks(items: list[Any], **fields: Any) -> list[dict[str, Any]]:
    found = events(streamed(API, asked(stream=True, **fields), Fake(items)))
    assert found[-1] == (None, "[DONE]")
    return [data for _, data in found[:-1]]


def test_a_prompt_is_taken_as_it_is() -> None:
    ask = asked(max_tokens=5, temperature=0, stop=["\n"], user="u")
    assert ask.plain and ask.prompt == "Once" and ask.options == {"max_tokens": 5, "stop": ["\n"]}
    assert ask.sampling == {"temperature": 0} and ask.unread == ["user"] and not ask.others
    assert asked().options == {}  # OpenAI's own 16 tokens would be a surprise
    assert asked(prompt=[5, 6]).prompt == [5, 6]


@pytest.mark.parametrize("prompt", [["a", "b"], [[1, 2], [3]], ["a", [3]]], ids=str)
def test_several_prompts(prompt: list[Any]) -> None:
    ask = asked(prompt=prompt, max_tokens=3)
    assert [ask.prompt, *(other.prompt for other in ask.others)] == prompt
    assert all(other.options == ask.options and other.plain for other in ask.others)


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": ["a"] * (MOST_PROMPTS + 1)}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"best_of": 4}, "best_of"),
        ({"logprobs": True}, "logprobs"),
        ({"logprobs": 2, "echo": True}, "logprobs"),
        ({"echo": 1}, "echo"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_wrong_values_are_named(given: dict[str, Any], param: str) -> None:
    with pytest.raises(Refusal) as error:
        asked(**given)
    assert API.refused(error.value)["error"]["param"] == param and error.value.status == 400


def test_fields_that_say_nothing_are_taken() -> None:
    assert asked(suffix="", best_of=1, echo=False, logprobs=None).options == {}
    assert asked(n=2, best_of=2).options == {"n": 2}


def test_an_answer_is_the_text_with_its_tags() -> None:
    items = [part("<think>"), thinks("Hm."), part("</think>"), says("Yes"), ends("length")]
    made = answered(API, asked(), Fake(items))
    assert made["object"] == "text_completion" and made["id"].startswith("cmpl-")
    assert made["choices"] == [
        {"index": 0, "text": "<think>Hm.</think>Yes", "logprobs": None, "finish_reason": "length"}
    ]
    assert made["usage"]["total_tokens"] == 16
    found = [chunk["choices"][0] for chunk in chunks([*items[:2], Alive(), part(), *items[2:]])]
    assert [choice["text"] for choice in found] == ["<think>", "Hm.", "", "</think>", "Yes", ""]
    assert [choice["finish_reason"] for choice in found] == [None] * 5 + ["length"]


def test_the_usage_comes_last_and_alone() -> None:
    made = chunks([says("a"), ends()], stream_options={"include_usage": True})
    assert made[-1]["choices"] == [] and made[-1]["usage"]["prompt_tokens"] == 11
    assert [chunk["usage"] for chunk in made[:-1]] == [None, None]


def test_an_echo_is_of_each_ones_own_prompt() -> None:
    items = [says("a"), says("b", index=1), says("c", index=2), says("d", index=3)]
    fields: dict[str, Any] = {"prompt": ["One ", [72, 105]], "n": 2, "echo": True}
    texts = {72: "H", 105: "i"}
    made = answered(API, asked(**fields), Fake(items, texts=texts))["choices"]
    assert [choice["text"] for choice in made] == ["One a", "One b", "Hic", "Hid"]
    written = ["", "", "", ""]
    for _, chunk in events(streamed(API, asked(stream=True, **fields), Fake(items, texts=texts)))[:-1]:
        written[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert written == ["One a", "One b", "Hic", "Hid"]


def test_log_probabilities_in_the_older_shape() -> None:
    texts = {5: "Ye", 6: "s", 9: "No"}
    items = [
        part("Ye", token=5, logprob=-0.25, top=[(5, -0.25), (9, -1.5)]),
        part(token=6, logprob=-0.5, top=[(9, -0.1)]),
        part("s", token=7, logprob=float("-inf"), finish="stop"),
    ]
    assert asked(logprobs=2).options == {"logprobs": True, "top_logprobs": 2}
    assert asked(logprobs=0).options == {"logprobs": True}
    told = answered(API, asked(logprobs=2), Fake(items, texts=texts))["choices"][0]["logprobs"]
    assert told == {
        "tokens": ["Ye", "s", "7"],
        "token_logprobs": [-0.25, -0.5, -9999.0],
        "top_logprobs": [{"Ye": -0.25, "No": -1.5}, {"s": -0.5, "No": -0.1}, {"7": -9999.0}],
        "text_offset": [0, 2, 3],
    }
    found = events(streamed(API, asked(stream=True, logprobs=2), Fake(items, texts=texts)))[:-1]
    pieces = [chunk["choices"][0]["logprobs"] for _, chunk in found]
    assert {key: sum((piece[key] for piece in pieces), []) for key in told} == told


def test_an_error_in_a_stream_ends_it() -> None:
    [(_, first), (_, told), (_, last)] = events(
        streamed(API, asked(stream=True), Fake([says("a"), Refusal("busy", "Wait.")]))
    )
    assert first["choices"][0]["text"] == "a" and last == "[DONE]"
    assert told["error"] == {
        "message": "Wait.", "type": "rate_limit_error", "param": None, "code": "rate_limit_exceeded",
    }  # fmt: skip


def test_the_client_reads_every_chunk() -> None:
    openai = pytest.importorskip("openai")
    items = [part("Yes", token=1, logprob=-0.5, top=[(1, -0.5)]), Alive(), ends()]
    fields: dict[str, Any] = {"logprobs": 1, "stream_options": {"include_usage": True}}
    for chunk in chunks(items, **fields):
        assert isinstance(chunk.pop("choices"), list)  # their type of a chunk is that of an answer
    openai.types.Completion.model_validate(answered(API, asked(logprobs=1), Fake(items)), strict=True)
