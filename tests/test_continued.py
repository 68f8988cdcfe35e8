"""An answer that was begun goes on: with the demo, from every place of its own answers, to the same end."""

import re

import pytest

from mlx_qwen35 import Engine, Sampling, generate_batch, load, stream_generate
from mlx_qwen35.errors import ArgumentError, PromptError

GREEDY = Sampling(temperature=0)
SORT = {"role": "user", "content": "Sort these words: queen, jacket, violin"}


@pytest.fixture(scope="module")
def demo():
    return load()


def answered(demo, prompt, **options):
    return list(stream_generate(*demo, prompt, **{"sampling": GREEDY, "max_tokens": 60, **options}))


def joined(parts, name):
    return "".join(getattr(part, name) for part in parts)


@pytest.mark.parametrize("thinking", [True, False])
def test_a_cut_answer_goes_on_to_its_end(demo, thinking):
    processor = demo[1]
    prompt = processor.prompt([SORT], enable_thinking=thinking)
    whole = answered(demo, prompt)
    text, reasoning, content = (joined(whole, name) for name in ("text", "reasoning", "content"))
    tokens = [part.token for part in whole]
    cuts = []
    for at in range(1, len(tokens)):
        said = processor.decode(tokens[:at])
        thought, closed, rest = said.rpartition("\n</think>\n\n") if thinking else ("", "-", said)
        if thinking and not closed and "</think>" in said:
            continue  # between the two there is nothing that a message could hold
        last = {"role": "assistant", "content": rest if closed else ""}
        if thinking:
            last["reasoning_content"] = thought if closed else rest
        if not last["content"] and closed:
            continue  # over, and nothing said: the thinking goes on
        cuts.append(at)
        parts = answered(demo, [SORT, last], continue_final_message=True, enable_thinking=thinking)
        begun = processor.prompt([SORT, last], continue_final_message=True, enable_thinking=thinking)
        assert begun.tokens == prompt.tokens + tokens[:at] and begun.thinking == (thinking and not closed)
        assert said + joined(parts, "text") == text and parts[-1].finish_reason == "stop"
        assert last["content"] + joined(parts, "content") == content
        assert (last.get("reasoning_content", "") + joined(parts, "reasoning")).rstrip("\n") == reasoning
    assert len(cuts) > 4


def test_batches_and_the_engine_go_on_too(demo):
    last = {"role": "assistant", "content": "jacket, "}
    asked = {"continue_final_message": True, "enable_thinking": False, "sampling": GREEDY, "max_tokens": 20}
    batch = generate_batch(*demo, [[SORT, last], [SORT, {**last, "content": "jacket, queen,"}]], **asked)
    assert [answer.content for answer in batch][1] == " violin"
    with Engine(*demo) as engine:
        assert engine.submit([SORT, last], **asked).result().content == batch[0].content
    several = answered(demo, [SORT, last], **asked, n=2)
    assert {part.index for part in several} == {0, 1}


def test_a_form_is_that_of_the_whole_answer(demo):
    asked = {"continue_final_message": True, "enable_thinking": False}
    for content, more in (("ab", r"[a-z]12"), ("abc1", "2"), ("", r"[a-z]{3}12")):
        prompt = [SORT, {"role": "assistant", "content": content}]
        for sampling in (GREEDY, Sampling(temperature=1, seed=1)):
            parts = answered(demo, prompt, **asked, sampling=sampling, response_format=re.compile("[a-z]{3}12"))
            assert re.fullmatch(more, joined(parts, "content")) and parts[-1].finish_reason == "stop"
    with pytest.raises(ArgumentError, match="what there is of the answer does not fit its form"):
        answered(demo, [SORT, {"role": "assistant", "content": "1"}], **asked, response_format=re.compile("[a-z]{3}"))


def test_a_budget_of_reasoning_counts_what_is_new(demo):
    last = {"role": "assistant", "content": "", "reasoning_content": "A to"}
    asked = {"continue_final_message": True, "enable_thinking": True, "thinking_budget": 0}
    parts = answered(demo, [SORT, last], **asked)
    assert joined(parts, "text").startswith("\n</think>\n\n") and not joined(parts, "reasoning")
    parts = answered(demo, [SORT, {**last, "content": "jacket,"}], **asked)  # no reasoning, no budget
    assert joined(parts, "content") == " queen, violin"


def test_a_prompt_is_made_with_it(demo):
    prompt = demo[1].prompt("hi")
    with pytest.raises(PromptError, match="give continue_final_message= to processor.prompt"):
        answered(demo, prompt, continue_final_message=True)
