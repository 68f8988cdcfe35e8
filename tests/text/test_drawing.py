"""Markdown drawn while it comes: what is shown, and that pieces make no difference."""

import random
import re
import time

import pytest

from mlx_qwen35.text.cells import Pen, harmless, width
from mlx_qwen35.text.drawing import Drawing
from mlx_qwen35.text.screen import escape

ANSWER = """# A title
Some **bold text**, *leaning*, `code * here`, ~~gone~~ and a [link](https://example.org/a_(b)).

- first item that is long enough to be broken in a narrow terminal
  1. nested **item**
> quoted words of somebody who said much
---
```python
def f(x):
    return "`" * x  # a comment that is long
```
| name | value |
|---|---:|
| **alpha** | 1 |
| 漢字 | 22 |

$$
a * b * c
$$
これは日本語の文章で、とても長いので折り返されます。
**never closed and
42
"""


def draw(text: str, columns: int = 80, pieces: int | None = None, escapes: bool = False) -> str:
    written: list[str] = []
    pen = Pen(written.append, lambda: columns, escape if escapes else lambda *styles: "")
    drawing, rng = Drawing(pen), random.Random(pieces)
    while text:
        count = len(text) if pieces is None else rng.randint(1, 9)
        drawing.feed(text[:count])
        text = text[count:]
    drawing.finish()
    pen.end()
    return "".join(written)


@pytest.mark.parametrize(
    "text, shown",
    [
        ("a **b** c", "a b c"),
        ("2 * 3 * 4 and a*b", "2 * 3 * 4 and a*b"),
        ("snake_case_name and __init__(self)", "snake_case_name and init(self)"),
        ("`a * b * c`", "a * b * c"),
        ("``a ` b``", "a ` b"),
        (r"\*no\* and \[x_1 + y_2\]", r"*no* and \[x_1 + y_2\]"),
        ("$x_{1}$, $y_{2}$ for $5 and $6", "$x_{1}$, $y_{2}$ for $5 and $6"),
        ("see [here](http://x.org), [1] and ![p](q.png)", "see here (http://x.org), [1] and p (q.png)"),
        ("## Two\ntext", "Two\ntext"),
        ("#hash", "#hash"),
        ("* a\n+ b\n10. c", "• a\n• b\n10. c"),
        ("3.5 is a number\n1986 too", "3.5 is a number\n1986 too"),
        ("| no table\nat all", "| no table\nat all"),
        ("**open\nnext**", "**open\nnext**"),
        ("> > deep", "│ │ deep"),
        ("- [ ] task", "• [ ] task"),
        ("17 + 25 = 42", "17 + 25 = 42"),
    ],
)
def test_what_is_shown(text, shown):
    assert draw(text) == shown


def test_styles_are_the_terminals():
    assert draw("a **b `c`** d", escapes=True) == "a \x1b[1mb \x1b[0;1;36mc\x1b[0m d"
    assert draw("# T\nx", escapes=True) == "\x1b[1;4mT\n\x1b[0mx"


@pytest.mark.parametrize("columns", [8, 20, 80])
def test_pieces_make_no_difference(columns):
    whole = draw(ANSWER, columns, escapes=True)
    for seed in range(40):
        assert draw(ANSWER, columns, seed, escapes=True) == whole


@pytest.mark.parametrize("columns", [20, 40])
def test_narrow_lines_break_between_words(columns):
    shown = draw(ANSWER, columns)
    prose = [line for line in shown.splitlines() if "http" not in line and "return" not in line]
    assert all(width(line) <= columns for line in prose)
    words = re.findall(r"\w+", "first item that is long enough to be broken in a narrow terminal")
    assert " ".join(words) in " ".join(shown.split())


def test_a_table_that_is_too_wide_is_a_list():
    table = "| name | what it is for |\n|---|---|\n| alpha | the very first one |\n| beta | the second |\n"
    shown = draw(table, 20)
    assert "name: alpha" in shown and "|" not in shown and "│" not in shown
    assert draw(table, 80).splitlines()[0] == "name  │ what it is for"


def test_code_is_left_as_it_is():
    code = "def f():\n\treturn '**a**' # x" + "y" * 90
    shown = draw(f"```python\n{code}\n```\nafter")
    assert code in shown and "python" in shown and shown.endswith("after")
    assert code in draw(f"```\n{code}")  # cut inside


def test_a_span_that_does_not_end_is_not_held_for_long():
    written: list[str] = []
    drawing = Drawing(Pen(written.append, lambda: 80, lambda *styles: ""))
    drawing.feed("begin **not bold " + "word " * 100)
    assert "**not bold word word" in "".join(written).replace("\n", " ")


@pytest.mark.parametrize("piece", "[ *a_ ` $x |_[a]( **a* [a](b -_ >_ \\( _a_b ~~ ![[".split())
@pytest.mark.parametrize("count", [None, 1])
def test_no_text_takes_long(piece, count):
    begin = time.perf_counter()
    draw(piece * 2500, pieces=count)
    draw("|" + piece * 2500 + "|\n|---|\n", pieces=count)
    assert time.perf_counter() - begin < 5


def test_control_characters_are_shown():
    given = "a\x1b[2Jb\x07\x08\x7f\x9b31m\u202ec\td\r\ne\r"
    assert harmless(given) == "a\u241b[2Jb\u2407\u2408\u2421\\u009b31m\\u202ec\td\ne\u240d"


def test_marks_at_random_lose_no_word():
    rng = random.Random(3)
    marks = ["a", "b1", "**", "*", "_", "`", "[", "](", ")", "\n", "- ", "| x |", "\\", "$", "#", "~~"]
    for _ in range(300):
        words = [rng.choice(marks) for _ in range(30)]
        text = " ".join(words) if rng.random() < 0.5 else "".join(words)
        whole = draw(text)
        assert sum(map(str.isalnum, whole)) == sum(map(str.isalnum, text)) or "](" in text or "```" in text
        assert draw(text, pieces=rng.randrange(1000)) == whole
