"""Where an answer is in its grammar: reasoning, line ends, form, end."""

import copy
import dataclasses
import threading

import llguidance
import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError, GrammarError
from mlx_qwen35.grammar import Grammar, Matcher
from mlx_qwen35.grammar.vocabulary import vocabulary
from tests.grammar.walks import bits, run, walk

NUMBER = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def allowed(processor, matcher) -> set[int]:
    return set(np.flatnonzero(bits(matcher.mask(), processor.config.text.vocab_size)))


def test_nothing_asked_is_no_grammar(processor):
    assert Grammar.of(processor) is None
    assert Grammar.of(processor, response_format={"type": "text"}) is None
    assert Grammar.of(processor, tools=[{"name": "f"}]) is None


def test_an_answer_ends_where_it_is_complete(processor):
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=False)
    ends = set(processor.eos_token_ids)
    assert matcher.mask().shape == (32,) and matcher.mask().dtype == np.uint32
    assert not matcher.complete and not matcher.finished and not ends & allowed(processor, matcher)
    assert run(processor, matcher, '{"n": 12')
    assert not matcher.complete and not ends & allowed(processor, matcher)
    assert run(processor, matcher, "}")
    assert matcher.complete and matcher.finished and allowed(processor, matcher) == ends
    matcher.advance(min(ends))
    assert matcher.complete and matcher.finished


def test_what_may_go_on_is_not_finished(processor):
    matcher = Grammar.of(processor, response_format={"type": "regex", "pattern": "a+"}).matcher(thinking=False)
    assert run(processor, matcher, "a")
    assert matcher.complete and not matcher.finished


def test_reasoning_is_free_and_has_an_end(processor):
    control, ends = processor.tokenizer.control_tokens, set(processor.eos_token_ids)
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=True)
    size = processor.tokenizer.vocab_size
    assert allowed(processor, matcher) == set(range(size)) - ends
    assert run(processor, matcher, "what? {<tool_call>")
    matcher.advance(control["<tool_call>"])
    assert not matcher.complete and not matcher.finished
    matcher.advance(control["</think>"])
    assert run(processor, matcher, '\n\n{"n":1}') and matcher.finished


def test_the_blank_line_may_be_left_out_and_is_one(processor):
    close = processor.tokenizer.control_tokens["</think>"]
    grammar = Grammar.of(processor, response_format=NUMBER)
    for blank, fits in (("", True), ("\n", True), ("\n\n", True), ("\n\n\n", False)):
        matcher = grammar.matcher(thinking=True)
        matcher.advance(close)
        assert run(processor, matcher, blank + '{"n":1}') is fits
    assert not run(processor, grammar.matcher(thinking=False), '\n{"n":1}')


def test_letters_do_not_end_the_reasoning(processor):
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=True)
    assert not run(processor, matcher, "hm </think>")
    assert run(processor, matcher, "</thing>")


def test_the_model_may_open_a_reasoning_itself_once(processor):
    control = processor.tokenizer.control_tokens
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=False)
    matcher.advance(control["<think>"])
    assert run(processor, matcher, "well")
    matcher.advance(control["</think>"])
    assert matcher.accepted([control["<think>"]]) == 0
    assert run(processor, matcher, '{"n":1}') and matcher.complete


def test_no_added_token_and_no_surplus_row_in_a_form(processor):
    wide = copy.copy(processor)
    text = dataclasses.replace(processor.config.text, vocab_size=1100)
    wide.config = dataclasses.replace(processor.config, text=text)
    added = set(processor.tokenizer.control_tokens.values())
    anything = {"type": "grammar", "grammar": "start: TEXT\nTEXT: /(?s:.*)/"}
    for form in (anything, "json", {}):
        matcher = Grammar.of(wide, response_format=form).matcher(thinking=False)
        assert len(matcher.mask()) == 35
        first = allowed(wide, matcher) - {processor.tokenizer.control_tokens["<think>"]}
        assert first & added <= set(processor.eos_token_ids) and max(first) < processor.tokenizer.vocab_size
        run(wide, matcher, '{"a')
        assert allowed(wide, matcher) & added <= set(processor.eos_token_ids)
        assert max(allowed(wide, matcher)) < processor.tokenizer.vocab_size
    assert max(allowed(wide, Grammar.of(wide, response_format={}).matcher(thinking=True))) < 1024


def test_words_that_spell_an_added_token_are_written_in_letters(processor):
    form = {"type": "object", "properties": {"<think>": {"const": "<|im_end|>"}}, "required": ["<think>"]}
    form["additionalProperties"] = False
    matcher = Grammar.of(processor, response_format=form).matcher(thinking=False)
    answer = walk(processor, matcher, np.random.default_rng(0))
    assert answer.ended and answer.complete
    assert processor.decode(answer.tokens).replace(" ", "").replace("\n", "").replace("\t", "") == (
        '{"<think>":"<|im_end|>"}'
    )


def test_drafts_are_cut_where_the_grammar_ends_them(processor):
    encode, control = processor.tokenizer.encode, processor.tokenizer.control_tokens
    grammar = Grammar.of(processor, response_format=NUMBER)
    matcher = grammar.matcher(thinking=False)
    good = encode('{"n": 12}')
    end = min(processor.eos_token_ids)
    assert matcher.accepted(good) == len(good) == matcher.accepted([*good, end]) - 1
    assert matcher.accepted([*good, end, end]) == len(good) + 2
    bad = encode("x")
    assert matcher.accepted([*good[:-1], *bad, *good[-1:]]) == len(good) - 1
    assert matcher.accepted([*good[:-1], end]) == len(good) - 1
    assert matcher.accepted([1 << 20]) == matcher.accepted([-1]) == matcher.accepted([]) == 0
    begun = matcher.copy()
    begun.advance(good[0])
    assert begun.accepted([1 << 20]) == begun.accepted([-1]) == 0
    before = matcher.mask().copy()
    assert (matcher.mask() == before).all() and matcher.accepted(good) == len(good)
    matcher.advance(good[0])
    assert matcher.accepted(good[1:]) == len(good) - 1
    inside = grammar.matcher(thinking=True)
    tokens = [*encode("so"), control["</think>"], *encode("\n\n"), *good]
    assert inside.accepted(tokens) == len(tokens)
    assert inside.accepted([*tokens, *bad]) == len(tokens)
    assert inside.accepted([*encode("so"), end]) == len(encode("so"))


def test_accepted_is_what_advancing_would_say(processor):
    grammar = Grammar.of(processor, response_format={})
    generator = np.random.default_rng(1)
    for _ in range(30):
        answer = walk(processor, grammar.matcher(thinking=False), generator, most=30)
        tokens = list(answer.tokens)
        tokens.insert(int(generator.integers(len(tokens) + 1)), int(generator.integers(1024)))
        matcher, steps = grammar.matcher(thinking=False), 0
        count = matcher.accepted(tokens)
        for token in tokens:
            if not bits(matcher.mask(), 1024)[token]:
                break
            matcher.advance(token)
            steps += 1
        assert count == steps


def test_copies_go_their_own_ways(processor):
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=False)
    assert run(processor, matcher, '{"n":')
    other = matcher.copy()
    assert run(processor, other, "7}") and other.finished
    assert not matcher.complete and run(processor, matcher, "8")
    assert other.finished and not matcher.finished


def test_a_token_that_may_not_come_is_an_error_and_changes_nothing(processor):
    matcher = Grammar.of(processor, response_format=NUMBER).matcher(thinking=False)
    with pytest.raises(GrammarError, match="does not fit"):
        matcher.advance(processor.tokenizer.encode("x")[0])
    assert run(processor, matcher, '{"n":1}')


def test_what_cannot_be_followed_is_an_error_and_no_end(processor):
    """llguidance then allows the end alone (findings/llguidance-allows-the-end-where-it-gave-up.sh)."""
    known = vocabulary(processor)
    limits = llguidance.LLParserLimits(step_lexer_fuel=300, verbose_errors=False)
    text = '%llguidance {"no_forcing": true}\nstart: %json {"type": "object"}'
    inner = llguidance.LLMatcher(known.tokenizer, text, log_level=0, limits=limits)
    matcher = Matcher(inner, known, thinking=False)
    with pytest.raises(GrammarError, match="cannot be followed any further"):
        for token in processor.tokenizer.encode('{"a":', plain=True):
            assert not matcher.finished and not matcher.complete
            matcher.advance(token)
        matcher.mask()
    assert not matcher.complete


def test_masks_cannot_be_written_to(processor):
    for thinking in (True, False):
        with pytest.raises(ValueError):
            Grammar.of(processor, response_format="json").matcher(thinking=thinking).mask()[0] = 0


def test_thinking_needs_its_token(processor):
    bare = copy.copy(processor)
    bare.tokenizer = copy.copy(processor.tokenizer)
    bare.tokenizer.control_tokens = {
        name: token for name, token in processor.tokenizer.control_tokens.items() if "think" not in name
    }
    grammar = Grammar.of(bare, response_format="json")
    with pytest.raises(ArgumentError, match="</think>"):
        grammar.matcher(thinking=True)
    assert run(bare, grammar.matcher(thinking=False), "{}")


def test_what_is_asked_again_is_compiled_once(processor):
    forms = [{"const": at} for at in range(40)]
    first = Grammar.of(processor, response_format={"const": "once"})
    assert Grammar.of(processor, response_format={"const": "once", "title": "says nothing"}) is first
    for form in forms:
        assert run(processor, Grammar.of(processor, response_format=form).matcher(thinking=False), str(form["const"]))
    assert Grammar.of(processor, response_format={"const": "once"}) is not first


def test_one_grammar_serves_many_threads(processor):
    fresh = copy.copy(processor)
    Grammar.prepare(fresh)
    grammar = Grammar.of(fresh, response_format={})
    expected = walk(fresh, grammar.matcher(thinking=False), np.random.default_rng(3)).tokens
    found = []

    def answer() -> None:
        found.append(walk(fresh, grammar.matcher(thinking=False), np.random.default_rng(3)).tokens)

    threads = [threading.Thread(target=answer) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
