"""The published vocabulary: 248,077 tokens, a head of 248,320 rows."""

import json

import numpy as np
import pytest

from mlx_qwen35.grammar import Grammar
from mlx_qwen35.library import load_processor
from tests.grammar.walks import bits, run
from tests.published import write_published_files


@pytest.fixture(scope="module")
def published(shared_dir, tmp_path_factory):
    return load_processor(write_published_files(shared_dir / "model_data", tmp_path_factory.mktemp("published")))


def test_surplus_rows_and_added_tokens_are_never_allowed(published):
    size, known = published.config.text.vocab_size, published.tokenizer.vocab_size
    assert (size, known) == (248320, 248077)
    control = published.tokenizer.control_tokens
    ends, added = set(published.eos_token_ids), set(control.values())
    matcher = Grammar.of(published, response_format={"type": "regex", "pattern": "(?s:.)*"}).matcher(thinking=True)
    assert matcher.mask().shape == (7760,) and not bits(matcher.mask(), size)[[*ends, *range(known, size)]].any()
    matcher.advance(control["</think>"])
    allowed = set(np.flatnonzero(bits(matcher.mask(), size)))
    assert len(allowed) > 240_000 and max(allowed) < known and allowed & added == ends


def test_natural_tokens_are_allowed(published):
    schema = {"type": "object", "properties": {"name": {"type": "string"}, "n": {"type": "number"}}, "required": ["n"]}
    matcher = Grammar.of(published, response_format=schema).matcher(thinking=False)
    for token in published.tokenizer.encode(
        json.dumps({"name": "Ünder the <think> tree\n", "n": -2.5}, indent=2, ensure_ascii=False), plain=True
    ):
        assert bits(matcher.mask(), 248320)[token]
        matcher.advance(token)
    assert matcher.finished


def test_a_call_in_its_usual_tokens(published):
    tool = {"name": "write", "parameters": {"type": "object", "properties": {"text": {"type": "string"}}}}
    call = "<tool_call>\n<function=write>\n<parameter=text>\nif a < b:\n    pass\n\n</parameter>\n</function>\n"
    call += "</tool_call>"
    tokens = published.tokenizer.encode("Well.\n</think>\n\n" + call)
    matcher = Grammar.of(published, tools=[tool], tool_choice="required").matcher(thinking=True)
    assert matcher.accepted(tokens) == len(tokens)
    for token in tokens:
        matcher.advance(token)
    assert matcher.complete and run(published, matcher, "\n" + "<tool") is False
