"""Expressions as they are written for llguidance, against Python's own."""

import itertools
import json
import re

import pytest
from jsonschema import Draft202012Validator

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar import Grammar
from mlx_qwen35.grammar.regex import found, literal, whole, without
from tests.grammar.walks import run

TEXTS = ["".join(letters) for size in range(5) for letters in itertools.product("ab1\n-", repeat=size)][:400]


def matches(processor, expression, text) -> bool:
    form = {"type": "grammar", "grammar": f"start: TEXT\nTEXT: /{expression}/"}
    matcher = Grammar.of(processor, response_format=form).matcher(thinking=False)
    return run(processor, matcher, text) and matcher.complete


@pytest.mark.filterwarnings("ignore:Possible set")
@pytest.mark.parametrize(
    "pattern",
    ["a*b", "^a|b$", "[^a-b]", "[-1]+", r"\d\D", r"\w+\W?", r"\s", ".", "(?s:.)a", r"a\Z", "a&&b", "[a&&b]", "(?i:A)b"]
    + [r"[\d-]{1,2}", "a{2}", "[]a]", "a??b", "(?:a|(?:^b))1|", "(?:a|b)+?1{2}|"],
)
def test_whole_texts(processor, pattern):
    expression = whole(re.compile(pattern))
    for text in TEXTS[::7]:
        matched = re.fullmatch(pattern, text) is not None and not (text.endswith("\n") and pattern.endswith("$"))
        assert matches(processor, expression, text) == matched, text


@pytest.mark.parametrize(
    "pattern", ["a", "^a", "a$", "^a$|1", "^(a|b)", "(a|1)$", "^$", "", "^", "b1|^-", "^-.", "[^ab]"]
)
def test_found_in_texts(processor, pattern):
    expression = found(pattern)
    for text in TEXTS[::7]:
        if "\n" not in text:  # before which Python's $ matches too
            assert matches(processor, expression, text) == (re.search(pattern, text) is not None), text


def test_literals_are_themselves(processor):
    text = 'a.b*[c](d)"\\/\n{2}^$|é日😀#'
    assert matches(processor, literal(text), text) and not matches(processor, literal("a.c"), "abc")


def test_texts_without_words():
    words = ("<ab", "</ab", "<c>")
    expression = re.compile(re.sub(r"\\x\{([0-9a-f]+)\}", lambda code: "\\x" + code[1].zfill(2), without(words)))
    for size in range(6):
        for letters in itertools.product("<ab/c>", repeat=size):
            text = "".join(letters)
            assert (expression.fullmatch(text) is not None) == (not any(word in text for word in words)), text


ESCAPES = ['\\"', "\\\\", r"\n", r"\t", r"\r", r"\f", r"\u0001", r"\u000b", r"\u001f", r"\u007f", "/", "a", "é", "5"]
BODIES = ["", *ESCAPES, *(f"a{escape}b" for escape in ESCAPES), *(f"{escape}5{escape}" for escape in ESCAPES[:4])]


@pytest.mark.parametrize(
    "pattern",
    [r'^[^"]*$', r"^[^\\]*$", r'^[^"\\]*$', "^.*$", "^a.b$", "(?s)^.*$", r"^\s$", r"^\S+$", r"^\W*$", r"^\D*$"]
    + [r"^\w*$", r"^[\s\S]*$", r"^[^a-c\n]*$", r'^[^ -"]*$', r"^[\x00-!]*$", r"^[\x00-/]*$", r'(?i)^[^A"]*$']
    + [r"(?i)^[^A]+$", r'^(?:\n|[^"\n])*$', r'^(?:a|b|[^"])+$', r'^[^"]{3}$|^a', r'[^"]{2}', r"^[^\x08]*$"]
    + [r"^[\x08\n]*$", r'^[\b"]+$'],
)
def test_patterns_of_strings_with_escapes(processor, pattern):
    """Of what is written with escapes only that comes whose value matches, and all of it but U+0008."""
    schema = {"type": "string", "pattern": pattern}
    grammar = Grammar.of(processor, response_format=schema)
    for body in BODIES:
        matcher = grammar.matcher(thinking=False)
        taken = run(processor, matcher, f'"{body}"') and matcher.complete
        value = json.loads(f'"{body}"')
        assert taken == (re.search(pattern, value) is not None and not _reads_apart(pattern, value)), body
        assert not taken or Draft202012Validator(schema).is_valid(value), body


def _reads_apart(pattern: str, value: str) -> bool:
    """Where Python and JSON Schema's dialect read a pattern differently, and the form has what both allow."""
    return bool(
        (value.endswith("\n") and re.search(pattern.replace("$", r"\Z"), value) is None)
        or ("." in pattern and "(?s)" not in pattern and "\r" in value)
        or ("\\s" in pattern and "\x1f" in value)
        or (("\\w" in pattern or "\\W" in pattern) and "é" in value)
    )


@pytest.mark.parametrize("pattern", [r"^\x08$", r'^(?:\x08|[^"])*$', r"[\b]", r"^[\b-\x08]$"])
def test_a_backspace_alone_is_refused(pattern):
    with pytest.raises(ArgumentError, match="U\\+0008"):
        found(pattern)


@pytest.mark.parametrize("pattern", ["a(?=b)", "(?<!a)b", r"(a)\1", r"a\b", "a^b", "(a$)+", "(?>a)", "a++"])
def test_what_has_no_counterpart_is_refused(pattern):
    with pytest.raises(ArgumentError, match="expression"):
        whole(pattern)
