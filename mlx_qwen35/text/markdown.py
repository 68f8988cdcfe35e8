"""Answers as Markdown for a notebook: what a model says is text there, and brings no HTML, no picture and no script.

Knows Markdown, and which characters of it reach beyond text. Knows nothing of notebooks.

A model may say anything, and a notebook runs what it shows: a tag, a link to `javascript:`, a picture whose address
carries the conversation away. So outside of code no `<` may begin a tag, no bracket a picture, and links lead to the
web only; the HTML in what comes out is from here. Code is put into fences and tags that what it holds cannot end.
Whatever a renderer takes for code where this file does not, or the other way round, then shows an entity, and nothing
worse.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from html import escape
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_qwen35.text.reply import ToolCall

_FENCE = re.compile(r"([ \t]*)(?:>[ \t]?)*(`{3,}|~{3,})([^`\n]*)")
_LANGUAGE = re.compile(r"[\w+#.-]{1,30}")
_SPAN = re.compile(r"(?<!`)(`{1,2})(?!`)((?:[^\n]|\n(?![ \t]*\n))+?)(?<!`)\1(?!`)")
# Formulas: $$..$$, $..$, \[..\], \(..\); none goes over an empty line.
_MATH = re.compile(
    r"\$\$(?:[^$\n]|\n(?![ \t]*\n))+\$\$"
    r"|(?<![\\$\w])\$(?![\s$])[^$\n]*(?<![\s\\])\$(?![\d$])"
    r"|\\\[(?:[^\n]|\n(?![ \t]*\n))+?\\\]"
    r"|\\\([^\n]+?\\\)"
)
_TAG = re.compile(r"<(?=[A-Za-z/!?])")
_LINK = re.compile(r"\]\((?!\s*(?:https?://|mailto:|#))", re.IGNORECASE)


def safe_markdown(text: str) -> str:
    """What a model wrote, for any renderer of Markdown: formatted, with code and formulas, and inert."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "\ufffd")
    shown: list[str] = []
    prose: list[str] = []
    lines = iter(text.split("\n"))
    for line in lines:
        fence = _FENCE.fullmatch(line)
        if not fence:
            prose.append(line)
            continue
        indent, mark, info = fence.groups()
        code = []
        for inner in lines:
            bare = inner.strip().lstrip("> \t")
            if len(bare) >= len(mark) and set(bare) == {mark[0]}:
                break
            code.append(inner.removeprefix(indent))
        shown += [_prose("\n".join(prose)), code_block("\n".join(code), info.strip())]
        prose = []
    return "".join([*shown, _prose("\n".join(prose))]).strip("\n")


def code_block(code: str, language: str = "") -> str:
    """Code in a fence that it cannot end, with empty lines around."""
    longest = max((len(run) for run in re.findall(r"`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"\n\n{fence}{language if _LANGUAGE.fullmatch(language) else ''}\n{code}\n{fence}\n\n"


def reply_markdown(reasoning: str, content: str, calls: Iterable[ToolCall], *, thinking: bool = False) -> str:
    """An answer: reasoning folded away (open while it is `thinking`), content, calls as JSON."""
    shown = []
    if reasoning:
        summary = "Reasoning ..." if thinking else f"Reasoning ({len(reasoning.split())} words)"
        shown.append(folded(summary, _lines(reasoning), unfolded=thinking))
    shown += [safe_markdown(content)] if content else []
    for call in calls:
        record = json.dumps({"name": call.name, "arguments": call.arguments}, ensure_ascii=False, indent=1)
        shown.append(code_block(record, "json").strip("\n"))
    return "\n\n".join(shown)


def folded(summary: str, html: str, *, unfolded: bool = False) -> str:
    """HTML (from here, on one line) behind a summary."""
    return f"<details{' open' if unfolded else ''}><summary>{escape(summary)}</summary>{html}</details>"


def table(cells: Mapping[str, Any]) -> str:
    """One row of values under their names, on one line of HTML."""
    names = "".join(f"<th>{escape(name)}</th>" for name in cells)
    values = "".join(f"<td>{escape(str(value))}</td>" for value in cells.values())
    return f"<table><thead><tr>{names}</tr></thead><tbody><tr>{values}</tr></tbody></table>"


def _lines(text: str) -> str:
    """Text as HTML on one line, for an empty line would end the HTML and begin Markdown."""
    return "<br>".join(_entities(line) for line in text.strip().splitlines())


def _prose(text: str) -> str:
    """Text without fenced code: formulas and code in the line by themselves, the rest made inert."""
    shown, at = [], 0
    while found := _first(text, at):
        shown.append(_inert(text[at : found.start()]))
        shown.append(_code(found) if found.re is _SPAN else _formula(found.group()))
        at = found.end()
    return "".join([*shown, _inert(text[at:])])


def _first(text: str, at: int) -> re.Match[str] | None:
    found = [match for pattern in (_SPAN, _MATH) if (match := pattern.search(text, at))]
    return min(found, key=lambda match: match.start(), default=None)


def _code(span: re.Match[str]) -> str:
    """Code in the line: as it is where nothing in it needs care, otherwise as HTML."""
    code = span.group(2)
    if _inert(code) == code:
        return span.group()
    return f"<code>{_entities(code.strip())}</code>"


def _formula(formula: str) -> str:
    """A formula between the marks that notebooks know. TeX does not mind spaces, so they keep what looks like HTML or
    a link apart."""
    if formula.startswith("\\"):
        mark = "$$" if formula[1] == "[" else "$"
        formula = f"{mark}{formula[2:-2].strip()}{mark}"
    formula = _TAG.sub("< ", formula).replace("![", "! [").replace("](", "] (").replace("]:", "] :")
    return re.sub(r"(`|~)(?=\1)", r"\1 ", formula)


def _inert(text: str) -> str:
    text = _TAG.sub("&lt;", text)
    text = re.sub(r"`{3,}|~{3,}", lambda run: _entities(run.group()), text)  # no fence but ours
    text = text.replace("![", "&#33;&#91;").replace("]:", "]&#58;")
    return _LINK.sub("]&#40;", text)


def _entities(text: str) -> str:
    """Every sign as an entity: means itself to HTML, and nothing to Markdown."""
    return re.sub(r"[^\w\s]|_", lambda sign: f"&#{ord(sign.group())};", text).replace("\n", " ")
