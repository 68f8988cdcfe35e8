"""Messages as clients send them, in the form that templates read, and as transformers renders them."""

import base64
import io
import json

import pytest
from PIL import Image

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import PromptError
from mlx_qwen35.library import demo_folder
from mlx_qwen35.processor import Processor
from mlx_qwen35.text.contents import MediaPart
from mlx_qwen35.text.messages import check_messages, in_order, split_reasoning
from mlx_qwen35.text.template import ChatTemplate
from tests.published import published_template

PUBLISHED = ("chat_template.jinja", "chat_template.0.8B-2B.jinja", "chat_template.3.6.jinja", "chat_template.3.8.jinja",
             "chat_template.3.8-2.4T.jinja")  # fmt: skip


def user(content):
    return {"role": "user", "content": content}


def answer(content=None, **fields):
    return {"role": "assistant", "content": content, **fields}


def texts(*parts):
    return [{"type": "text", "text": part} for part in parts]


def checked(*messages):
    return in_order(check_messages(messages))


def one(message):
    (made,) = check_messages([message])
    return made


@pytest.fixture(scope="module")
def processor() -> Processor:
    return Processor.from_folder(demo_folder(), ModelConfig.from_folder(demo_folder()))


# Roles


@pytest.mark.parametrize("first", ["system", "developer"])
@pytest.mark.parametrize("second", ["system", "developer"])
def test_leading_system_messages_are_joined(first, second):
    made = checked({"role": first, "content": "One.\n"}, {"role": second, "content": texts("Tw", "o.")}, user("hi"))
    assert made == [{"role": "system", "content": "One.\n\nTwo."}, user("hi")]


@pytest.mark.parametrize("empty", [None, "", [], texts(""), " \n"])
def test_empty_system_messages_join_nothing(empty):
    one, three = {"role": "system", "content": "One."}, {"role": "developer", "content": "Three."}
    made = checked(one, {"role": "system", "content": empty}, three, user("hi"))
    assert made[0] == {"role": "system", "content": "One.\n\nThree."} and len(made) == 2


def test_a_later_system_message_leaves_the_beginning_as_it_was(processor):
    before = [{"role": "system", "content": "One."}, user("hi")]
    late = {"role": "developer", "content": "Two."}
    assert checked(*before, late) == [*before, user("Two.")]
    assert checked(*before, {"role": "system", "content": None}, user("x")) == [*before, user("x")]
    text = processor.prompt([*before, late, user("?")]).text
    assert text.startswith(processor.apply_chat_template(before, tokenize=False) + "<|im_start|>user\nTwo.<|im_end|>")


def test_pictures_go_to_the_last_message_of_the_user_and_not_to_a_system_message(processor):
    picture = Image.new("RGB", (64, 64))
    text = processor.prompt([user("a"), {"role": "system", "content": "b"}], images=[picture]).text
    assert text.index("<|image_pad|>") < text.index("a<|im_end|>")


def test_a_function_is_a_tool():
    assert one({"role": "function", "name": "f", "content": "5"}) == {"role": "tool", "name": "f", "content": "5"}


def test_system_beside_messages_that_begin_with_one(processor):
    for role in ("system", "developer"):
        with pytest.raises(PromptError, match="use one of the two"):
            processor.prompt([{"role": role, "content": "a"}, user("x")], system="b")


# Contents


@pytest.mark.parametrize("role", ["system", "developer", "user", "assistant", "tool", "function"])
@pytest.mark.parametrize("content", [None, "", [], texts(""), "missing"])
def test_empty_contents_in_every_role(processor, role, content):
    message = {"role": role} | ({} if content == "missing" else {"content": content})
    before = [] if role in ("system", "developer") else [user("a")]
    prompts = [processor.prompt([*before, made, user("b")]).text for made in (message, message | {"content": ""})]
    assert prompts[0] == prompts[1]


@pytest.mark.parametrize(
    "part",
    [
        "hi",
        {"text": "hi"},
        {"type": "text", "text": "hi", "cache_control": {"type": "ephemeral"}, "image": None},
        {"type": "input_text", "text": "hi"},
        {"type": "output_text", "text": "hi", "annotations": []},
        {"type": "text", "content": "hi"},
        {"type": "message", "content": "hi"},
        {"type": "refusal", "refusal": "hi"},
        {"type": "tool_reference", "tool_name": "hi"},
    ],
)
@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
def test_parts_that_are_text(role, part):
    assert one({"role": role, "content": [part]})["content"] == texts("hi")


def test_a_refusal_beside_no_content():
    assert one(answer(None, refusal="No."))["content"] == "No."


PNG = io.BytesIO()
Image.new("RGB", (64, 64), "red").save(PNG, "PNG")
DATA = base64.b64encode(PNG.getvalue()).decode()
URL = f"data:image/png;base64,{DATA}"
PICTURES = {
    "image_url": {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
    "image_url, flat": {"type": "image_url", "image_url": URL},
    "input_image": {"type": "input_image", "image_url": URL, "detail": "auto"},
    "anthropic": {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": DATA}},
    "anthropic, url": {"type": "image", "source": {"type": "url", "url": URL}},
    "mcp": {"type": "image", "data": DATA, "mimeType": "image/png"},
    "lm studio": {"type": "image", "data_url": URL},
    "lm studio, plain": {"type": "image", "data_url": URL, "data": None},
    "hugging face": {"type": "image", "url": URL},
    "base64": {"type": "image", "base64": DATA},
}


@pytest.mark.parametrize("name", PICTURES)
@pytest.mark.parametrize("role", ["user", "tool", "function", "assistant"])
def test_pictures_in_every_spelling_and_role(processor, name, role):
    call = answer(None, tool_calls=[{"name": "read", "arguments": ""}])
    prompt = processor.prompt([user("x"), call, {"role": role, "content": [PICTURES[name], "a.png"]}, user("?")])
    (medium,) = prompt.media
    assert prompt.tokens.count(processor.config.image_token_id) == medium.tokens


def test_anthropics_sources_that_hold_no_picture():
    with pytest.raises(PromptError, match=r"messages\[0\]\.content\[0\]\.source has no url"):
        check_messages([user([{"type": "image", "source": {"type": "file", "file_id": "f"}}])])


# Reasoning


@pytest.mark.parametrize(
    "message",
    [
        answer("So", reasoning_content="Why"),
        answer("So", reasoning="Why"),
        answer("So", thinking="Why"),
        answer("So", reasoning_content="Why", reasoning="Why "),
        answer("So", reasoning_content=None, reasoning="Why"),
        answer("So", reasoning_content="", reasoning="Why"),
        answer([{"type": "thinking", "thinking": "Why", "signature": ""}, *texts("So")]),
        answer([{"type": "redacted_thinking", "data": "x"}, {"type": "reasoning", "text": "Why"}, "So"]),
    ],
)
def test_reasoning_by_all_its_names(processor, message):
    made = one(message)
    assert made["reasoning_content"] == "Why" and made["content"] in ("So", texts("So"))
    assert "<think>\nWhy\n</think>\n\nSo" in processor.prompt([user("x"), message]).text


def test_reasoning_that_is_no_text():
    with pytest.raises(PromptError, match=r"messages\[0\]\.reasoning_content is of type list"):
        check_messages([answer("x", reasoning_content=["a"])])
    assert "reasoning_content" not in one(answer("x", reasoning={"effort": "low"}, reasoning_content=None))


@pytest.mark.parametrize(
    ("content", "reasoning", "rest"),
    [
        ("<think>\nWhy\n</think>\n\nSo", "Why", "So"),
        ("<think>Why</think>So", "Why", "So"),
        (" <think>\n\n</think>\n\nSo", "", "So"),
        ("Why\n</think>\n\nSo", "Why", "So"),
        ("</think>\n\nSo", "", "So"),
        ("Why\n</think>", "Why", ""),
        ("<think>\nThe tag </think> ends it.\n</think>\n\nIt ends.", "The tag </think> ends it.", "It ends."),
        ("<think>Why</think>\n\nThe tag </think> ends it.", "Why", "The tag </think> ends it."),
    ],
)
def test_reasoning_that_an_answer_begins_with(content, reasoning, rest):
    for written in (content, texts(content), texts(content[:5], content[5:])):
        (made,) = split_reasoning([one(answer(written))])
        assert (made["reasoning_content"], made["content"]) == (reasoning, rest)


@pytest.mark.parametrize(
    "content",
    ["The tag </think> ends it.", "</think>", "<think>", "See:\n<think>\nx\n</think>\n\nSo", "a</think>b",
     "a\n</think>\nb"],
)  # fmt: skip
def test_tags_that_an_answer_speaks_of_stay_text(content):
    message = one(answer(content))
    assert split_reasoning([message]) == [message]
    kept = one(answer("<think>a</think>b", reasoning_content=""))
    assert split_reasoning([kept, one(user("<think>a</think>b"))]) == [kept, user("<think>a</think>b")]


# Calls and results


@pytest.mark.parametrize("arguments", ['{"a": [1, "<x>"]}', {"a": [1, "<x>"]}, ' {\n"a":[1,"<x>"]}\n'])
def test_arguments_as_text_or_object(arguments):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    (made,) = one(answer(None, tool_calls=[call]))["tool_calls"]
    assert made["function"] == {"name": "f", "arguments": {"a": [1, "<x>"]}}
    used = {"type": "tool_use", "id": "1", "name": "f", "input": arguments}
    assert one(answer(["So", used])) == answer(texts("So"), tool_calls=[made])
    assert one(answer(None, function_call=call["function"]))["tool_calls"] == [made["function"]]


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_empty_arguments(arguments):
    (made,) = one(answer("", tool_calls=[{"function": {"name": "f", "arguments": arguments}}]))["tool_calls"]
    assert made["function"]["arguments"] == {}


def test_broken_arguments():
    for part in ({"type": "tool_use", "name": "f", "input": '{"a'}, {"type": "tool_use", "input": {}}):
        with pytest.raises(PromptError, match=r"messages\[0\]\.content\[1\].*(not valid JSON|is no call)"):
            check_messages([answer(["x", part])])


@pytest.mark.parametrize("calls", [None, []])
def test_no_calls(calls):
    assert one(answer("x", tool_calls=calls)) == answer("x")


def test_results_in_a_message_of_the_user():
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": "5", "is_error": False},
        {"type": "tool_result", "tool_use_id": "2", "content": [PICTURES["anthropic"], "a.png"]},
        {"type": "tool_result", "tool_use_id": "3"},
    ]
    first, second, third, rest = check_messages([user([*results, "And?", "So?"])])
    assert first == {"role": "tool", "tool_call_id": "1", "content": "5"}
    assert isinstance(second["content"][0], MediaPart) and second["content"][1:] == texts("a.png")
    assert third["content"] == "" and rest == user(texts("And?", "So?"))
    with pytest.raises(PromptError, match=r"messages\[0\]\.content\[0\]\.content\[0\] has no text"):
        check_messages([user([{"type": "tool_result", "content": [{"type": "document"}]}])])


def test_the_callers_messages_are_left_alone():
    result, thought = {"type": "tool_result", "content": ["a"]}, {"type": "thinking", "thinking": "d"}
    messages = [user([result, "b"]), answer(["c", thought]), {"role": "developer", "content": None}]
    before = json.dumps(messages)
    split_reasoning(checked(*messages))
    assert json.dumps(messages) == before


def test_checked_messages_are_left_as_they_are():
    messages = checked({"role": "developer", "content": "a"}, user(["b"]), answer("<think>c</think>d"),
                       user([{"type": "tool_result", "content": "e"}]), {"role": "system", "content": "f"})  # fmt: skip
    assert checked(*messages) == messages
    assert split_reasoning(split_reasoning(messages)) == split_reasoning(messages)


# Against transformers

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"a": "1", "b": [True, None], "c": {"d": "é"}}}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
SHOWN = [{"type": "image"}, {"type": "text", "text": "look"}]
CONVERSATIONS = {
    "plain": [user("hi")],
    "system": [{"role": "system", "content": " Be brief.\n"}, user("hi")],
    "empty system": [{"role": "system", "content": ""}, user("hi")],
    "parts": [{"role": "system", "content": texts("a", "b")}, user(texts("c ", " d"))],
    "turns": [user("a"), answer("b"), user("c"), answer(" d\n"), user("e")],
    "reasoning": [user("a"), answer("b", reasoning_content="\nwhy\n"), user("c"), answer("d", reasoning_content="e")],
    "inline": [user("a"), answer("<think>\nwhy\n</think>\n\nb"), user("c"), answer("<think>e</think>d"), user("f")],
    "inline at the end": [user("a"), answer("<think>\nwhy\n</think>\n\nb")],
    "without opening": [user("a"), answer("why\n</think>\n\nb", tool_calls=CALLS), {"role": "tool", "content": "5"}],
    "call": [user("a"), answer("", tool_calls=CALLS), {"role": "tool", "content": "5"}],
    "calls": [user("a"), answer("b", tool_calls=CALLS * 2), *[{"role": "tool", "content": texts("5")}] * 2, user("c")],
    "no content": [user("a"), answer(None, tool_calls=CALLS, reasoning="why"), {"role": "tool", "content": "5"}],
    "image": [user(SHOWN), answer("b"), user("c")],
    "image of a tool": [user("a"), answer("", tool_calls=CALLS), {"role": "tool", "content": SHOWN}],
    "unknown role": [user("a"), {"role": "robot", "content": "b"}],
    "no user": [answer("b")],
}  # fmt: skip
VARIABLES = ({}, {"enable_thinking": False}, {"enable_thinking": True}, {"preserve_thinking": True},
             {"preserve_thinking": False}, {"reasoning_effort": "low"}, {"add_vision_id": True})  # fmt: skip


@pytest.mark.parametrize("file", ["demo", *PUBLISHED])
def test_conversations_are_rendered_as_transformers_renders_them(processor, file):
    """Each with and without tools, variables and the beginning of an answer; what one refuses, both refuse."""
    chat_template_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    if file == "demo":
        source = processor.template.source
    else:
        source = published_template(file)
    ours = Processor(**{**vars(processor), "template": ChatTemplate(source)})
    made = 0
    for name, messages in CONVERSATIONS.items():
        for tools in (None, [TOOL]):
            for variables in VARIABLES:
                for prompt in (True, False):
                    given = {"tools": tools, "add_generation_prompt": prompt, **variables}
                    try:
                        (theirs,), _ = chat_template_utils.render_jinja_template(
                            [messages], chat_template=source, **given
                        )
                    except Exception:
                        with pytest.raises(PromptError):
                            ours.apply_chat_template(messages, tokenize=False, **given)
                        continue
                    assert ours.apply_chat_template(messages, tokenize=False, **given) == theirs, (name, given)
                    if "3.8" not in file or not name.startswith(("inline", "without")):
                        assert ours.apply_chat_template(messages, **given) == ours.encode(theirs), (name, given)
                    made += 1
    assert made > 250
