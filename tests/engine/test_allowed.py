"""What may be asked: each value that means nothing is refused at the call, by the same error in all four places."""

import inspect
import math

import numpy as np
import pytest

from mlx_qwen35 import Chat, Prompt, Qwen35Error, Sampling, generate, generate_batch, stream_generate
from mlx_qwen35.cache import Cache
from mlx_qwen35.conversation import Conversation
from mlx_qwen35.engine.allowed import PromptOptions
from mlx_qwen35.errors import ArgumentError, PromptError
from tests.talkers import PROMPT, Endless, Script, Typist, random_model, say, spell


class Untouched(Script):
    """May not be asked for anything."""

    snapshot_bytes = 1 << 20

    def make_cache(self, batch=1, left_padding=None) -> Cache:
        return Cache([])

    def hidden(self, tokens, cache, media=(), **more):
        raise AssertionError("computed")


MODEL, PROCESSOR = Untouched(len(PROMPT)), Typist()


def in_a_chat(model, processor, prompt, **options):
    return Chat(model, processor, display="off", **options)


def in_a_message(model, processor, prompt, **options):
    return Chat(model, processor, display="off").send("hi", **options)


def in_a_batch(model, processor, prompt, **options):
    return generate_batch(model, processor, [prompt], **options)


CALLS = [stream_generate, generate, in_a_batch, in_a_chat, in_a_message]
WRONG = [
    ("max_tokens", -1, "max_tokens is -1; it must be 0 or more, or None"),
    ("max_tokens", "5", "max_tokens is '5', of type str; give a whole number"),
    ("max_tokens", 2.5, "max_tokens is 2.5, of type float"),
    ("max_tokens", True, "max_tokens is True; give a whole number"),
    ("max_tokens", math.nan, "max_tokens is nan"),
    ("max_tokens", {5}, "max_tokens is .5., of type set"),
    ("thinking_budget", -5, "thinking_budget is -5"),
    ("sampling", {"temperature": 0.5, "top_k": 3}, r"write Sampling\(temperature=0.5, top_k=3\)"),
    ("sampling", 0.5, "sampling is 0.5, of type float; give a Sampling"),
    ("stop", 5, "stop is 5, of type int; give a text or a list of texts"),
    ("stop", "", "stop holds '', of type str; a stop string is a text that is not empty"),
    ("stop", ["x", ""], "stop holds ''"),
    ("stop", ["x", 5], "stop holds 5"),
    ("stop", b"x", "stop is b'x'"),
    ("system", ["be"], "system is .'be'., of type list; give a text"),
    ("system", 5, "system is 5, of type int; give a text"),
    ("tools", "add", "tools is 'add', of type str; give a list of tools"),
    ("tools", {"name": "add"}, "tools is .*of type dict; give a list of tools"),
    ("enable_thinking", "no", "enable_thinking is 'no', of type str; give True or False"),
    ("enable_thinking", 1, "enable_thinking is 1"),
    ("reasoning_effort", 3, "reasoning_effort is 3"),
    ("preserve_thinking", "yes", "preserve_thinking is 'yes'"),
    ("chat_template_kwargs", "x", "chat_template_kwargs is 'x', of type str; give a dict"),
    ("chat_template_kwargs", {1: 2}, "chat_template_kwargs is .1: 2."),
    ("allow_control_tokens", None, "allow_control_tokens is None; give True or False"),
    ("fps", "2", "fps is '2', of type str; give a number"),
    ("fps", 0, "fps is 0; it must be above 0"),
    ("fps", math.inf, "fps is inf; give a finite number"),
    ("max_pixels", 0, "max_pixels is 0; it must be 1 or more"),
    ("max_pixels", 1e6, "max_pixels is 1000000.0, of type float; give a whole number"),
    ("fetch", "all", "fetch is 'all'"),
    ("context_length", "4k", "context_length is '4k'"),
    ("context_length", 1, "context_length is 1; it must be 2 or more"),
    ("chunk_size", 0, "chunk_size is 0; it must be 1 or more"),
    ("chunk_size", "8", "chunk_size is '8'"),
    ("on_progress", 5, "on_progress is 5, of type int; give a function"),
]
ALONE = [  # what a batch and a chat do not take
    ("continue_final_message", "yes", "continue_final_message is 'yes', of type str; give True or False"),
    ("mtp", "yes", "mtp is 'yes'"),
    ("num_draft_tokens", 0, "num_draft_tokens is 0; it must be 1 to 4"),
    ("num_draft_tokens", True, "num_draft_tokens is True"),
    ("draft_model", "small", "draft_model is 'small', of type str; give what load_draft_model returns"),
    ("session", "a.session", r"session is 'a.session', of type str; give a Session, or load_session\("),
    ("cache", [], r"cache is .*give what model.make_cache\(\) made"),
    ("covered", -1, "covered is -1, the cache holds 0 tokens"),
    ("covered", "7", "covered is '7'"),
    ("boundaries", 5, "boundaries is 5"),
    ("boundaries", ["a"], "a number of boundaries is 'a'"),
    ("cancel", 5, "cancel is 5, of type int; give a function or a threading.Event"),
    ("images", "cat.png", r"images is 'cat.png', of type str; give a list of images, also for a single one"),
    ("videos", b"...", "videos is b'...'"),
]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name, value, says", WRONG)
def test_a_value_that_means_nothing(call, name, value, says):
    with pytest.raises(ArgumentError, match=says) as refused:
        call(MODEL, PROCESSOR, PROMPT, **{name: value})
    assert "\n" not in str(refused.value) and isinstance(refused.value, (Qwen35Error, ValueError, TypeError))


@pytest.mark.parametrize("call", [stream_generate, generate])
@pytest.mark.parametrize("name, value, says", ALONE)
def test_a_value_that_means_nothing_to_one_answer(call, name, value, says):
    with pytest.raises(ArgumentError, match=says):
        call(MODEL, PROCESSOR, PROMPT, **{name: value})


def test_a_long_value_is_shown_by_its_beginning():
    with pytest.raises(ArgumentError) as refused:
        stream_generate(MODEL, PROCESSOR, PROMPT, max_tokens=[7] * 10_000)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "name, says",
    [
        ("max_token", "did you mean max_tokens"),
        ("max_new_tokens", "did you mean max_tokens"),
        ("thinking", "did you mean enable_thinking"),
        ("thinking_budge", "did you mean thinking_budget"),
        ("temperature", r"write sampling=Sampling\(temperature=...\)"),
        ("temp", r"write sampling=Sampling\(temperature=...\)"),
        ("temprature", r"did you mean sampling=Sampling\(temperature=...\)\?"),
        ("top_p", r"write sampling=Sampling\(top_p=...\)"),
        ("sampler", "did you mean sampling"),
        ("prefill_step_size", "did you mean chunk_size"),
        ("zzz", "there are .*max_tokens"),
        ("verbos", "verbose|there are .*max_tokens"),  # and not videos
    ],
)
def test_a_name_that_there_is_not(call, name, says):
    with pytest.raises(ArgumentError, match=f"no option {name}.*{says}"):
        call(MODEL, PROCESSOR, PROMPT, **{name: 5})


@pytest.mark.parametrize("name", ["cache", "prompt_cache", "verbose", "session"])
def test_what_only_other_ways_take_is_not_taken_for_something_else(name):
    with pytest.raises(ArgumentError, match=f"generate_batch has no option {name}; there are images"):
        generate_batch(MODEL, PROCESSOR, [PROMPT], **{name: 5})


@pytest.mark.parametrize("call", [stream_generate, generate, in_a_batch, in_a_message])
def test_a_context_that_the_model_was_not_loaded_for(call):
    with pytest.raises(ArgumentError, match="context_length is 1000000000, and the model was loaded for"):
        call(MODEL, PROCESSOR, PROMPT, context_length=10**9)


def test_what_generate_has_beside_the_others_is_checked_too():
    for name in ("verbose", "content_only"):
        with pytest.raises(ArgumentError, match=f"{name} is 'yes'"):
            generate(MODEL, PROCESSOR, PROMPT, **{name: "yes"})
    with pytest.raises(ArgumentError, match="no option verbos; did you mean verbose"):
        generate(MODEL, PROCESSOR, PROMPT, verbos=True)


@pytest.mark.parametrize("call", CALLS)
def test_model_and_processor_in_their_places(call):
    for model, processor, says in [
        (PROCESSOR, MODEL, r"the model comes first, then the processor"),
        ((MODEL, PROCESSOR), PROCESSOR, r"model, processor = load\(...\)"),
        ("demo", PROCESSOR, "model is 'demo', of type str; give the model that load returns"),
        (None, PROCESSOR, "model is None; give the model that load returns"),
        (MODEL, "a prompt", "processor is 'a prompt', of type str; give the processor"),
        (MODEL, MODEL, "processor is .*; give the processor that load returns"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            call(model, processor, PROMPT)


def test_arguments_that_are_missing_or_too_many():
    for call in (stream_generate, generate, generate_batch):
        with pytest.raises(ArgumentError, match=r"load gives two: model, processor = load\(...\)"):
            call((MODEL, PROCESSOR), "hi")
        with pytest.raises(ArgumentError, match=f"{call.__name__}: missing a required argument: 'prompt"):
            call(MODEL, PROCESSOR)
        with pytest.raises(ArgumentError, match=f"{call.__name__}: too many positional arguments"):
            call(MODEL, PROCESSOR, PROMPT, 100)


def test_prompts_of_a_batch_are_a_list():
    message = {"role": "user", "content": "hi"}
    for prompts, says in [
        ("hi", "prompts is 'hi', of type str; give a list of prompts"),
        ([message], r"prompts is one conversation; give a list of prompts: \[messages\]"),
        (Prompt([1], None, False), r"one prompt; give a list: \[prompt\]"),
        (np.array([1, 2]), r"one prompt; give a list: \[prompt\]"),
        (5, "prompts is 5"),
    ]:
        with pytest.raises(ArgumentError, match=says):
            generate_batch(MODEL, PROCESSOR, prompts)
    with pytest.raises(ArgumentError, match=r"images\[0\] is 'a.png', of type str; give a list of images"):
        generate_batch(MODEL, PROCESSOR, [PROMPT], images=["a.png"])


def test_a_batch_may_have_a_limit_for_each_prompt():
    made = generate_batch(say("abcdef"), Typist(), [PROMPT] * 3, max_tokens=[2, 0, 4])
    assert [answer.text for answer in made] == ["ab", "", "abcd"]
    assert [answer.finish_reason for answer in made] == ["length"] * 3
    for limits, says in [([2], "has 1 numbers for 3 prompts"), ([1, -1, 2], r"max_tokens\[1\] is -1; it must")]:
        with pytest.raises(ArgumentError, match=says):
            generate_batch(MODEL, PROCESSOR, [PROMPT] * 3, max_tokens=limits)
    with pytest.raises(ArgumentError, match=r"max_tokens is \[2\], of type list"):
        generate(MODEL, PROCESSOR, PROMPT, max_tokens=[2])


def test_what_a_prompt_was_made_without_cannot_be_given_with_it():
    made = Prompt(list(PROMPT), None, False)
    for name, value in [("system", "be"), ("enable_thinking", False), ("reasoning_effort", "low"), ("fps", 1.0)]:
        with pytest.raises(PromptError, match=f"made already: give {name}= to processor.prompt"):
            stream_generate(MODEL, PROCESSOR, made, **{name: value})
    assert generate(say("ok"), PROCESSOR, made, tools=[], stop=("x",), max_tokens=np.int64(9)) == "ok"


def test_values_that_are_right_are_let_through():
    """None where it means something, numbers of NumPy, one-shot iterables, tuples."""
    options = {"max_tokens": np.int32(3), "stop": (text for text in ["xyz"]), "tools": None, "system": None}
    options |= {"boundaries": iter([2, 4]), "images": (), "num_draft_tokens": None, "cancel": lambda: False}
    assert generate(say("abcdef"), Typist(), PROMPT, **options) == "abc"
    assert generate_batch(say("abcdef"), Typist(), [PROMPT], tools=None, stop=iter(["e"]))[0].text == "abcd"


@pytest.mark.parametrize(
    "message, says",
    [("", "the message is empty"), ("  \n", "the message is empty"), (["hi"], "text is .'hi'., of type list")]
    + [(5, "text is 5, of type int; give a text"), (None, "text is None; give a text")],
)
def test_a_message_of_a_chat(message, says):
    chat = Chat(MODEL, PROCESSOR, display="off")
    with pytest.raises(PromptError, match=says):
        chat.send(message)
    assert chat.history == []


def test_what_a_chat_gives_itself_is_no_setting():
    for name in ("session", "cache", "covered", "features", "cancel", "continue_final_message"):
        with pytest.raises(ArgumentError, match=f"Chat has no option {name}"):
            Chat(MODEL, PROCESSOR, **{name: None})
        with pytest.raises(ArgumentError, match=f"no option {name}"):
            Conversation(MODEL, PROCESSOR).answer([{"role": "user", "content": "hi"}], print, **{name: None})
    for asked in (lambda: Chat(MODEL, PROCESSOR, n=2), lambda: Chat(MODEL, PROCESSOR, display="off").send("hi", n=2)):
        with pytest.raises(ArgumentError, match="^n is 2, and a conversation goes on with one answer; ask stream_gen"):
            asked()


def test_signatures_are_seen_by_whoever_asks():
    for call in (stream_generate, generate, generate_batch, Chat):
        names = inspect.signature(call).parameters
        assert {"max_tokens", "thinking_budget", "reasoning_effort", "chat_template_kwargs"} <= set(names)
    assert "temperature" in inspect.signature(Sampling).parameters


class Recorded(Endless):
    """Notes what it was told."""

    def prompt(self, prompt, **told):
        self.told = told
        return super().prompt(PROMPT)

    def prepare(self, messages, **reading):
        self.read = reading
        return [{"role": "user", "content": [{"type": "image", "image": None}]}]


TOLD = {
    "system": "be",
    "enable_thinking": False,
    "reasoning_effort": "low",
    "preserve_thinking": True,
    "chat_template_kwargs": {"a": 1},
    "allow_control_tokens": True,
    "fps": 2.0,
    "max_pixels": 64,
    "fetch": True,
}


@pytest.mark.parametrize("call", CALLS)
def test_what_the_template_is_told_arrives(call):
    processor = Recorded()
    model = Script(len(PROMPT), spell("ok"))
    model.snapshot_bytes = 1 << 20
    told = {**TOLD, "tools": [{"name": "add"}]}
    if call not in (in_a_chat, in_a_message):  # a chat goes on with no answer of its own
        told["continue_final_message"] = True
    asked = {**told, "max_tokens": 1}
    answer = call(model, processor, PROMPT, **asked)
    if isinstance(answer, Chat):
        answer.send("hi")
    shown = {name: processor.told.pop(name) for name in ("images", "videos") if name in processor.told}
    if call is in_a_message:  # what it shows is read already
        told = {name: value for name, value in told.items() if name not in ("fps", "max_pixels", "fetch")}
    assert processor.told == told and not any(shown.values())
    # what was not said is not passed on, so that it is the template's to decide
    assert PromptOptions().said == {}


def test_one_message_may_be_told_otherwise():
    processor, model = Recorded(), Script(len(PROMPT), spell("ok"))
    model.snapshot_bytes = 1 << 20
    chat = Chat(model, processor, display="off", reasoning_effort="low", max_tokens=1)
    chat.send("one", reasoning_effort="high", thinking_budget=None)
    assert processor.told["reasoning_effort"] == "high"
    chat.send("two", images=["a.png"], max_pixels=99)
    assert processor.told["reasoning_effort"] == "low" and processor.read["max_pixels"] == 99


def test_answers_go_on_until_the_context_is_full():
    processor = Endless()
    processor.context_length = 5000
    model = Script(len(PROMPT), spell("x" * 6000))
    *_, last = stream_generate(model, processor, PROMPT)
    assert (last.finish_reason, last.generation_tokens) == ("length", 5000 - len(PROMPT))
    model = Script(len(PROMPT), spell("x" * 6000))
    (answer,) = generate_batch(model, processor, [PROMPT])
    assert (answer.finish_reason, len(answer.tokens)) == ("length", 5000 - len(PROMPT))


def test_nothing_is_taken_for_the_whole_context_beforehand():
    processor, model = Endless(), random_model("dense")
    processor.context_length = 1_000_000
    cache = model.make_cache()
    stream = stream_generate(model, processor, PROMPT, cache=cache, sampling=Sampling())
    for _ in range(3):
        next(stream)
    assert sum(array.nbytes for array in cache.arrays()) < 2_000_000
    stream.close()
