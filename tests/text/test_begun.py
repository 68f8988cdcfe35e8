"""An answer that was begun goes on as if the model had written it: the prompt, and what is read of the rest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import PromptError
from mlx_qwen35.processor import Processor
from mlx_qwen35.text.begun import Begun
from mlx_qwen35.text.reply import Reply, ReplyParser, parse_reply
from mlx_qwen35.text.template import ChatTemplate
from tests.published import TEMPLATES, published_template, write_published_files

OPEN, NONE = "<|im_start|>assistant\n<think>\n", "<|im_start|>assistant\n<think>\n\n</think>\n\n"
QUESTION = {"role": "user", "content": "Why?"}
CALL = {"function": {"name": "f", "arguments": {"a": 1}}}
HISTORY = {
    "question": [QUESTION],
    "system": [{"role": "system", "content": "Be brief."}, QUESTION],
    "later": [QUESTION, {"role": "assistant", "reasoning_content": "Hm", "content": "So."}, QUESTION],
    "result": [QUESTION, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "4"}],
}
LAST = [
    {"content": "Because"},
    {"content": "Because", "reasoning_content": "It is so."},
    {"content": "Because", "reasoning_content": ""},
    {"content": "Two\n\nlines, ", "reasoning_content": "\nIt is\nso.\n"},
    {"content": [{"type": "text", "text": "In "}, {"type": "text", "text": "parts"}]},
]


@pytest.fixture(scope="module")
def processor(shared_dir, tmp_path_factory) -> Processor:
    folder = write_published_files(shared_dir / "model_data", tmp_path_factory.mktemp("published"))
    return Processor.from_folder(folder, ModelConfig.from_folder(folder))


@pytest.fixture(params=TEMPLATES)
def named(request, processor):
    """The name of a published template, and a processor that has it."""
    before, processor.template = processor.template, ChatTemplate(published_template(request.param))
    yield request.param, processor
    processor.template = before


def begun(processor, last, before=(QUESTION,), **options):
    messages = [*before, {"role": "assistant", **last}]
    return processor.prompt(messages, continue_final_message=True, **options)


@pytest.mark.parametrize("enable_thinking", [None, True, False])
def test_the_prompts_of_transformers(named, enable_thinking):
    """But for white space at the end, which they take away with the template's."""
    theirs = pytest.importorskip("transformers.utils.chat_template_utils").render_jinja_template
    name, processor = named
    if name == "chat_template.3.8-2.4T.jinja" and enable_thinking is False:
        pytest.skip("thinking cannot be switched off there")
    told = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
    for before in HISTORY.values():
        for last in LAST:
            messages = [*before, {"role": "assistant", **last}]
            (wanted,), _ = theirs(
                [messages], chat_template=processor.template.source, continue_final_message=True, **told
            )
            made = begun(processor, last, before, **told)
            assert made.text.rstrip() == wanted and not made.thinking
            assert made.tokens == processor.encode(made.text)
            said = last["content"] if isinstance(last["content"], str) else "In parts"
            assert made.continued == said and made.text.endswith(f"</think>\n\n{said}")


def test_a_reasoning_goes_on_where_there_is_no_content_yet(named):
    name, processor = named
    made = begun(processor, {"content": "", "reasoning_content": "Let me  "}, enable_thinking=True)
    assert made.text.endswith(OPEN + "Let me  ") and made.thinking and made.continued == "Let me  "
    made = begun(processor, {"content": None}, enable_thinking=True)
    assert made == processor.prompt([QUESTION], enable_thinking=True)
    if name != "chat_template.3.8-2.4T.jinja":  # thinking is off: what was thought is over
        made = begun(processor, {"content": "", "reasoning_content": "Let me"}, enable_thinking=False)
        assert made.text.endswith("<think>\nLet me\n</think>\n\n") and not (made.thinking or made.continued)


def test_a_reasoning_inside_the_content(named):
    """3.5 and 3.6 take it out, to 3.8 it is text."""
    name, processor = named
    made = begun(processor, {"content": "<think>\nHm\n</think>\n\nSo  "}, enable_thinking=True)
    assert not made.thinking
    if "3.8" in name:
        assert made.text.endswith(NONE + "<think>\nHm\n</think>\n\nSo  ")
        assert made.tokens.count(processor.tokenizer.token_id("</think>")) == 1
    else:
        assert made.text.endswith(OPEN + "Hm\n</think>\n\nSo  ") and made.continued == "So  "
        made = begun(processor, {"content": "Hm\n</think>\n\n"}, enable_thinking=True)
        assert made.text.endswith(OPEN + "Hm\n</think>\n\n") and not (made.thinking or made.continued)


def test_a_template_without_reasoning():
    assert Begun("Hm", "So").behind("<|im_start|>assistant\n") == ("<|im_start|>assistant\nSo", "So")


WORDS = ("<think>", "</think>", "<|im_end|>", "<|im_start|>", "<", "a", " ", "\n")
SPELLED = st.lists(st.sampled_from(WORDS)).map("".join)


@given(reasoning=st.none() | SPELLED, content=SPELLED, thinking=st.booleans())
def test_what_is_spelled_in_it_is_text(processor, reasoning, content, thinking):
    last = {"content": content} | ({} if reasoning is None else {"reasoning_content": reasoning})
    made = begun(processor, last, enable_thinking=thinking)
    control = [token for token in made.tokens if token in processor.tokenizer.control_tokens.values()]
    names = ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<think>", *([] if made.thinking else ["</think>"])]
    assert control == [processor.tokenizer.token_id(name) for name in names]
    assert processor.decode(made.tokens) == made.text and made.text.endswith(made.continued)
    if made.thinking:
        assert thinking and not content and made.continued == (reasoning or "")
    elif reasoning is not None:
        assert made.text.endswith(f"<think>\n{reasoning.strip()}\n</think>\n\n{content}") and made.continued == content


def test_control_tokens_may_be_asked_for(processor):
    made = begun(processor, {"content": "a <|im_end|>"}, allow_control_tokens=True)
    assert made.tokens[-1] == processor.tokenizer.token_id("<|im_end|>") and made.continued == "a <|im_end|>"


@pytest.mark.parametrize(
    "messages, says",
    [
        ([QUESTION], "the last message is of role user"),
        ("Why?", "a text is a user's message"),
        ([1, 2, 3], "token ids go on as they are"),
        ([{"role": "assistant", "content": "So"}], "no message comes before"),
        ([QUESTION, {"role": "assistant", "content": "So", "tool_calls": [CALL]}], "tool_calls, which end an answer"),
        ([QUESTION, {"role": "assistant", "content": [{"type": "image", "image": "a.png"}]}], "a picture or video"),
    ],
)
def test_what_cannot_go_on(processor, messages, says):
    with pytest.raises(PromptError, match=says):
        processor.prompt(messages, continue_final_message=True)


# What is read of the rest.


def rest_of(whole, at, **options):
    """The events of a reply whose beginning stands in the prompt, one character at a time."""
    parser = ReplyParser(continued=whole[:at], tools=[{"name": "f", "parameters": {}}], **options)
    return [event for character in whole[at:] for event in parser.feed(character)] + parser.finish()


@pytest.mark.parametrize("thinking", [True, False])
def test_a_reply_cut_anywhere_is_read_on(thinking):
    whole = "First  line\n\n second <b> `x`\n"
    whole += "\n</think>\n\nSo  it\nis.\n\n" if thinking else ""
    read = parse_reply(whole, thinking=thinking)
    for at in range(1, len(whole) if not thinking else whole.index("\n</think>")):
        rest = Reply.from_events(rest_of(whole, at, thinking=thinking))
        name = "reasoning" if thinking else "content"
        kept = whole[:at]  # as people wrote it, white space at its end included
        assert (kept + getattr(rest, name)).rstrip() == getattr(read, name)
        assert not thinking or rest.content == read.content


def test_the_tags_of_a_reply_that_goes_on():
    bare = "<function=f>\n<parameter=a>\n1\n</parameter>\n</function>"
    call = f"<tool_call>\n{bare}\n</tool_call>"

    def rest(whole, at):
        reply = Reply.from_events(rest_of(whole, at, thinking=False))
        return reply.content, [made.name for made in reply.tool_calls]

    assert rest(f"Let me see.\n\n{call}", 11) == rest(f"Yes: {call}", 4) == ("", ["f"])
    assert rest(f"So:\n{bare}", 4) == rest(f"So:\n  {bare}", 6) == ("", ["f"])
    assert rest(f"Say {bare}", 4) == (bare, [])  # not at the beginning of a line
    assert rest("It is <think> then", 6) == ("<think> then", [])
    assert rest("It is\n</think>\n\nso", 5) == ("\n</think>\n\nso", [])
