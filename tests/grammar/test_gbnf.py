"""GBNF, character by character."""

import json
import random

import numpy as np
import pytest

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar import Grammar
from mlx_qwen35.grammar.gbnf import lark_of
from tests.grammar.walks import run, walk

JSON = r"""
root   ::= value  # an answer
value  ::= object | array | string | number | ("true" | "false" | "null") ws
object ::= "{" ws ( string ":" ws value
    ("," ws string ":" ws value)* )? "}" ws
array  ::= "[" ws (value ("," ws value)*)? "]" ws
string ::= "\"" ([^"\\\x00-\x1F\x7F] | "\\" (["\\bfnrt] | "u" [0-9a-cA-C] [0-9a-fA-F]{3}))* "\"" ws
number ::= "-"? ("0" | [1-9] [0-9]{0,15}) ("." [0-9]+)? ([eE] [-+]? [0-9]{1,2})? ws
ws     ::= | " " | "\n" [ \t]{0,20}
"""


def fits(processor, text, answer) -> bool:
    matcher = Grammar.of(processor, response_format={"type": "gbnf", "grammar": text}).matcher(thinking=False)
    return run(processor, matcher, answer) and matcher.complete


def test_json_in_gbnf(processor):
    grammar = Grammar.of(processor, response_format={"type": "gbnf", "grammar": JSON})
    generator = np.random.default_rng(0)
    answers = [walk(processor, grammar.matcher(thinking=False), generator, leaning=0.5) for _ in range(20)]
    ended = [answer for answer in answers if answer.ended]
    assert len(ended) > 10 and all(answer.complete for answer in ended)
    for answer in ended:
        json.loads(processor.decode(answer.tokens))
    assert fits(processor, JSON, '{"a": [1, -2.5e3, "x\\u00e9\\n"]}') and not fits(processor, JSON, '{"a": 01}')


@pytest.mark.parametrize(
    "text, good, bad",
    [
        ('root ::= "abc" "d" | [a-z]+ "!"', ["abcd", "abc!", "abz!"], ["abc", "abd"]),
        ('root ::= "abc" x | [a-z]+ "!" x\nx ::= "(" x ")" | "."', ["abc(.)", "abd!.", "abc!."], ["abd."]),
        ('root ::= "a"{2,3} [x-z-]? .', ["aa-é", "aaaq"], ["aq", "aaaaz-"]),
        (r'root ::= [^\]\n\x41-\u0043]+ "\U0001F600\t\""', ['xyz-😀\t"'], ['A😀\t"', ']😀\t"']),
        ("root ::=\n  a-b |\n  (\n a-b A )\na-b ::= [1]\nA ::= \"\" | \"2\"", ["1", "12"], ["2", "122"]),
        ('root ::= ("ab" | "c"){2}', ["abc", "cc"], ["ab", "abcc"]),
        ('root ::= "é"+', ["éé"], [""]),
    ],
)  # fmt: skip
def test_meaning(processor, text, good, bad):
    for answer in good:
        assert fits(processor, text, answer), answer
    for answer in bad:
        assert not fits(processor, text, answer), answer


@pytest.mark.parametrize("seed", range(60))
def test_words_mean_what_their_characters_do(processor, seed):
    """The same grammar with a recursion, which has words, and unrolled, which is one expression."""
    chance = random.Random(seed)

    def some(depth: int) -> str:
        ones = ["[ab]", "[^a]", '"a"', '"b"', '"\\""', '"ab"', "[a-c]", '"(b"', '[^"\\\\]', '"\\\\" [a"]']
        if depth == 0 or chance.random() < 0.3:
            return chance.choice(ones)
        inner = [some(depth - 1) for _ in range(chance.randint(1, 3))]
        kind = chance.randrange(4)
        if kind == 0:
            return f"({inner[0]}){chance.choice(['*', '+', '?', '{2}', '{1,2}', '{1,}'])}"
        if kind == 1:
            return f"({' | '.join(inner)})"
        return f'"\\"" ({inner[0]})* "\\""' if kind == 2 else " ".join(inner)

    body = [some(3) for _ in range(3)]
    recursive = f'root ::= x\nx ::= {body[0]} | {body[1]} {body[2]} | "(" x ")" | y\ny ::= {body[2]} {body[0]} "."'
    unrolled = "root ::= x0\n"
    for at in range(3):
        more = f'| "(" x{at + 1} ")"' if at < 2 else ""
        unrolled += f"x{at} ::= {body[0]} | {body[1]} {body[2]} | y {more}\n"
    unrolled += f'y ::= {body[2]} {body[0]} "."'
    grammars = [
        Grammar.of(processor, response_format={"type": "gbnf", "grammar": text}) for text in (recursive, unrolled)
    ]
    generator = np.random.default_rng(seed)
    for grammar, other in ((grammars[1], grammars[0]), (grammars[0], grammars[1])):
        for _ in range(6):
            answer = walk(processor, grammar.matcher(thinking=False), generator, most=12)
            text = processor.decode(answer.tokens)
            if answer.complete and "(((" not in text:
                matcher = other.matcher(thinking=False)
                assert run(processor, matcher, text) and matcher.complete, (recursive, text)


def test_what_is_a_word():
    string = r"/\x{22}(?:"
    assert string in lark_of(JSON)
    assert string not in lark_of(JSON.replace('"null")', '"null" | "\\"?")')), "something else begins with a quote"
    assert string not in lark_of(JSON.replace(r'"\"" ws', r'"\""+ ws')), "some texts begin others"


def test_rules_that_double_stay_small(processor):
    rules = "".join(f"r{at} ::= r{at + 1} r{at + 1}\n" for at in range(40)) + 'r40 ::= ""'
    assert fits(processor, "root ::= r0\n" + rules, "")


@pytest.mark.parametrize(
    "text, words",
    [
        ('x ::= "a"', ["root"]),
        ("root ::= y", ["line 1", "'y'"]),
        ('root ::= "a"\nroot ::= "b"', ["line 2", "twice"]),
        ("root ::= (", ["line 1", "closed"]),
        ('root ::= "a', ["line 1"]),
        ("root ::= [z-a]", ["backwards"]),
        ("root ::= []", ["empty"]),
        (r'root ::= "\q"', [r"'\\q'"]),
        ("root ::= *", ["repeats nothing"]),
        (r'root ::= "\uD800"', ["no character"]),
        ("root ::= " + "(" * 200, ["nest"]),
        ("= x", ["line 1"]),
    ],
)
def test_faults_are_named(processor, text, words):
    with pytest.raises(ArgumentError) as caught:
        fits(processor, text, "")
    assert all(word in str(caught.value) for word in words), caught.value
