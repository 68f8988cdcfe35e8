"""What a model writes, in a real browser: Markdown is shown, and nothing of it is ever run, fetched or followed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from mlx_qwen35.serving import endpoint
from tests.serving.browser import Script, answered, browser, opened, say
from tests.serving.fake import calls, ends, says, thinks
from tests.serving.running import running

RENDERED = """async ([text, cuts]) => {
    const {Rendered} = await import("/markdown.js");
    const into = document.createElement("div"), rendered = new Rendered(into);
    for (const end of cuts) rendered.show(text.slice(0, end));
    rendered.show(text, true);
    return into.innerHTML;
}"""
LINK = '<a href="{0}" rel="noopener noreferrer nofollow" target="_blank" title="{0}">{1}</a>'

HOSTILE = """<script>window.ran = 1</script>
<img src=x onerror="window.ran = 2"> <svg onload="window.ran = 3"></svg>

[click](javascript:window.ran=4) [data](data:text/html,<script>window.ran=5</script>) ![p](http://example.com/a.png)
<a href="javascript:window.ran=6">x</a> [file](file:///etc/passwd) [up](//example.com) <javascript:window.ran=7>

[**in** [a](http://example.com/"onmouseover="window.ran=8)](http://example.com/b)

```html"><script>window.ran=9</script>
<script>window.ran = 10</script>
```

| <img src=x onerror=window.ran=11> | b |
|---|---|
| <iframe src="javascript:window.ran=12"> | `<b>` |

<style>body { display: none }</style><base href="http://example.com/"><form action="http://example.com/"><input></form>
"""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    with browser() as chromium, running() as server, opened(chromium, server.url) as page:
        yield page


def shown(page: Any, text: str, cuts: list[int] | None = None) -> str:
    return page.evaluate(RENDERED, [text, cuts or []])


@pytest.mark.parametrize(
    ("text", "html"),
    [
        ("# One\n\n### Three ##", "<h3>One</h3><h5>Three</h5>"),
        ("a **b** *c* ~~d~~ `e*f*`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e*f*</code></p>"),
        ("***both*** snake_case_name 2*3*4", "<p><em><strong>both</strong></em> snake_case_name 2<em>3</em>4</p>"),
        ("one\ntwo", "<p>one<br>two</p>"),
        ("- a\n- b\n  - c\n\ndone", "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><p>done</p>"),
        ("3. a\n4. b", '<ol start="3"><li>a</li><li>b</li></ol>'),
        ("1. a\n  - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
        ("- [ ] a\n- [x] b", '<ul><li class="task">\u2610 a</li><li class="task">\u2611 b</li></ul>'),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
        ("<b>x</b> & y", "<p>&lt;b&gt;x&lt;/b&gt; &amp; y</p>"),
        ("\\*a\\* \\(x_1 + y_1\\)", '<p>*a* <span class="math">\\(x_1 + y_1\\)</span></p>'),
        ("[a *b*](http://x.org/c_(d))", f"<p>{LINK.format('http://x.org/c_(d)', 'a <em>b</em>')}</p>"),
        ("See https://x.org/a. (http://y.org)", f"<p>See {LINK.format('https://x.org/a', 'https://x.org/a')}. "
         f"({LINK.format('http://y.org/', 'http://y.org')})</p>"),
        ("[a](javascript:alert(1)) [b](/c)", "<p>[a](javascript:alert(1)) [b](/c)</p>"),
        ("**not closed and `neither", "<p>**not closed and `neither</p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(page: Any, text: str, html: str) -> None:
    assert shown(page, text) == html


def test_code_has_its_language_and_is_copied(page: Any) -> None:
    html = shown(page, "Look:\n```python\nif a < b:\n    pass\n```\nDone.")
    assert (
        "<span>python</span>" in html
        and "<code>if a &lt; b:\n    pass</code>" in html
        and html.endswith("<p>Done.</p>")
    )
    assert "<code>open" in shown(page, "```\nopen")
    table = shown(page, "| a | b |\n|:--|--:|\n| 1 | `x|y` |\n| 2 |")
    assert '<th class="end">b</th>' in table and "<code>x|y</code>" in table and "<td>2</td><td" in table


def test_a_text_that_grows_becomes_what_it_is_as_a_whole(page: Any) -> None:
    text = (
        "# T\n\na **b**\nc\n\n- x\n  - y\n\n```js\nlet a;\n\nlet b;\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n> q\n"
        + HOSTILE
    )
    whole = shown(page, text)
    for step in (1, 2, 7):
        assert shown(page, text, list(range(step, len(text), step))) == whole


@pytest.mark.parametrize(
    "text",
    ["*" * 50_000, "*a " * 15_000, "[" * 40_000, "[a](" * 10_000, "`" * 30_000 + "a", "> " * 20_000, "- " * 20_000,
     "#" + " " * 60_000 + "x", "https://" + ")" * 40_000, "\\(" * 20_000, "|" * 20_000 + "\n" + "|-" * 20_000,
     "a" + " " * 45_000 + "\nb", "_a_" * 10_000, "```" + " " * 50_000 + "`", "<http://a" * 5_000, "1. a\n" * 5_000],
    ids=range(16),
)  # fmt: skip
def test_no_text_takes_long(page: Any, text: str) -> None:
    spent = """async (text) => {
        const {Rendered} = await import("/markdown.js");
        const began = performance.now();
        new Rendered(document.createElement("div")).show(text, true);
        return performance.now() - began;
    }"""
    assert page.evaluate(spent, text) < 3000


def test_nothing_that_a_model_writes_is_run(page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    script = Script()
    monkeypatch.setattr(endpoint, "EngineAnswering", script)
    called = calls("<img src=x onerror=window.ran=21>", {"a": "<script>window.ran = 22</script>"})
    pieces = [says(piece) for piece in HOSTILE.splitlines(True)]
    script.says(thinks("<script>window.ran = 20</script>"), *pieces, called, ends())
    say(page, "<img src=x onerror=window.ran=23><script>window.ran = 24</script>")
    one = answered(page)
    assert page.evaluate("() => window.ran") is None
    assert one.locator("script, img, svg, iframe, style, form, base").count() == 0
    assert page.locator(".you .said *").count() == 0
    links = one.locator("a").evaluate_all("all => all.map(each => [each.protocol, each.rel, each.target])")
    assert links and all(each == ["http:", "noopener noreferrer nofollow", "_blank"] for each in links)
    text = one.locator(".text").inner_text()
    for shown_as in ("<script>window.ran = 1</script>", 'onerror="window.ran = 2"', "[click](javascript:window.ran=4)"):
        assert shown_as in text
    attributes = (
        "all => all.flatMap(each => [...each.attributes].map(one => one.name)).filter(name => /^on|style/.test(name))"
    )
    assert page.locator("#messages *").evaluate_all(attributes) == []


def test_what_gets_past_the_page_is_stopped_by_the_browser(page: Any) -> None:
    policy = page.evaluate("() => fetch('/').then(response => response.headers.get('content-security-policy'))")
    for rule in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self' data: blob:",
                 "connect-src 'self'", "base-uri 'none'", "form-action 'none'", "frame-ancestors 'none'"):  # fmt: skip
        assert rule in policy
    assert "unsafe" not in policy
