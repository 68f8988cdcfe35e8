"""Markdown drawn while it comes: headings, emphasis, lists, quotes, code and tables, each character written once.

Knows Markdown as models write it, and a pen. Knows nothing of terminals. Not a whole CommonMark: what is not certain to
be a mark is text. Nothing is drawn again, so what decides late is held back: the marks at the beginning of a line, an
emphasis, a link or a formula until its end (or 300 characters), a table until its last row.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from mlx_qwen35.text.cells import PLAIN, Pen, Style, width

BOLD, ITALIC, STRUCK, CODE, UNDERLINED, DIM = (
    frozenset({name}) for name in ("bold", "italic", "struck", "code", "underlined", "dim")
)
_LONGEST = 300  # characters of a span that is held back
# A beginning of a line that says nothing yet.
_MARKS = re.compile(r"[ \t]*(?:>[ \t]*)*(?:#{1,6}[ \t]*|[-*_+=~`\t ]*|\d{1,9}[.)]?[ \t]*|\$\$?|\\\[?)")
_FORMULAS = {"$$": "$$", "\\[": "\\]"}  # what opens and closes formulas of several lines
_FENCE = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([^`\n]*)")
_HEADING = re.compile(r" {0,3}(#{1,6})[ \t]+")
_ITEM = re.compile(r"([ \t]*)([-*+]|\d{1,9}[.)])[ \t]+(?=\S)")
_RULE = re.compile(r" {0,3}([-*_])[ \t]*(?:\1[ \t]*){2,}")
_QUOTE = re.compile(r" {0,3}>[ \t]?")
_ROW = re.compile(r"[ \t]*\|.*")
_UNDER_HEADER = re.compile(r"[ \t]*\|?[ \t]*:?-+:?[ \t]*(?:\|[ \t]*:?-+:?[ \t]*)*\|?[ \t]*")
_SPECIAL = re.compile(r"[`*_~\[!$\\]")
_ESCAPED = re.compile(r"\\([*_`~#\]|\\>])")
# Spans, of which the first that fits is taken.
_CODE = re.compile(r"(`+)(?!`)(.+?)(?<!`)\1(?!`)")
_FORMULA = re.compile(r"\$\$[^$\n]+\$\$|\$(?![\s$])[^$\n]*(?<![\s\\])\$(?![\d$])|\\\(.+?\\\)|\\\[.+?\\\]")
_LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)(?:[ ]+\"[^\"]*\")?\)")
_SPANS = [
    (_CODE, CODE),
    (_FORMULA, PLAIN),
    (_ESCAPED, PLAIN),
    (_LINK, UNDERLINED),
    (re.compile(r"(\*\*\*|___)(?=\S)(.+?)(?<=\S)\1"), BOLD | ITALIC),
    (re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![*_])"), BOLD),
    (re.compile(r"(\*|_)(?=[^\s*_])((?:[^*_]|\*\*[^*]+\*\*|(?<=\w)_(?=\w))+?)(?<=\S)\1(?![*_])"), ITALIC),
    (re.compile(r"(~~)(?=\S)(.+?)(?<=\S)\1"), STRUCK),
]


class Drawing:
    """Feed it the Markdown of one answer as it comes, then `finish` it once."""

    def __init__(self, pen: Pen, *, can_show: Callable[[str], bool] = lambda text: True) -> None:
        """can_show: whether the output has these characters; else there are plain ones."""
        self._pen = pen
        self._dash = "─" if can_show("─") else "-"
        self._bullet = "•" if can_show("•") else "*"
        self._bar = "│ " if can_show("│") else "| "
        self._text = ""  # fed, not yet drawn
        self._at_start = True  # of a line
        self._fence: tuple[str, str] | None = None  # what indents the open block of code, what closes it
        self._rows: list[str] = []  # of a table, perhaps
        self._style: Style = PLAIN  # of the line
        self._before = ""  # the last character drawn

    def feed(self, text: str) -> None:
        self._text += text
        while self._text and self._step(last=False):
            pass

    def finish(self) -> None:
        """Draws what was held back, now that nothing follows."""
        while self._text:
            self._step(last=True)
        self._draw_rows()
        self._pen.flush()
        if self._fence is not None and self._fence[1] not in _FORMULAS.values():
            if self._pen.column:
                self._pen.end_line()
            self._rule()
        self._fence = None

    def _step(self, *, last: bool) -> bool:
        """Draws something; False: more text is needed."""
        line, end, rest = self._text.partition("\n")
        whole = bool(end) or last
        if self._fence is not None:
            return self._code(line, end, rest, whole)
        if not self._at_start:
            return self._inline(line, end, rest, whole)
        if not whole and (_MARKS.fullmatch(line) or _ROW.match(line) or _begins_fence(line)):
            return False
        if _ROW.fullmatch(line) and (len(self._rows) != 1 or _UNDER_HEADER.fullmatch(line)):
            self._rows.append(line)
            self._text = rest
            return True
        self._draw_rows()
        self._begin(line, end, rest)
        return True

    def _begin(self, line: str, end: str, rest: str) -> None:
        """Draws the marks at the beginning of a line."""
        self._pen.hang, self._style, self._before = 0, PLAIN, ""
        if fence := _FENCE.fullmatch(line):
            self._fence = fence[1], fence[2]
            self._rule(fence[3].strip())
            self._text = rest
        elif end and line.strip() in _FORMULAS:
            self._fence = "", _FORMULAS[line.strip()]
            self._pen.verbatim(line)
            self._pen.end_line()
            self._text = rest
        elif _RULE.fullmatch(line):
            self._rule()
            self._text = rest
        else:
            if heading := _HEADING.match(line):
                self._style = BOLD | UNDERLINED if heading[1] == "#" else BOLD
                line = line[heading.end() :]
            else:
                line = self._margin(line)
            self._text = line + end + rest
            self._at_start = False
            if not line:
                self._inline("", end, rest, True)

    def _margin(self, line: str) -> str:
        """Draws quotes and the mark of a list's item; -> what follows them."""
        while quote := _QUOTE.match(line):
            self._pen.put(self._bar, DIM)
            self._pen.flush(trailing=True)
            line = line[quote.end() :]
        if item := _ITEM.match(line):
            mark = self._bullet if item[2] in "-*+" else item[2]
            self._pen.put(f"{item[1]}{mark} ", PLAIN)
            self._pen.flush(trailing=True)
            line = line[item.end() :]
        self._pen.hang = self._pen.column
        return line

    def _code(self, line: str, end: str, rest: str, whole: bool) -> bool:
        indent, mark = self._fence
        bare = line.strip()
        if mark in _FORMULAS.values():
            return self._formula(line, end, rest, whole)
        if self._at_start:
            closes = len(bare) >= len(mark) and set(bare) == {mark[0]}
            if not whole and not bare.strip(mark[0]):
                return False  # it may close the block, or be its indentation
            if closes:
                self._rule()
                self._fence, self._text = None, rest
                return True
            line = line.removeprefix(indent)
        self._pen.verbatim(line, CODE)
        self._at_start = bool(end)
        if end:
            self._pen.end_line()
        self._text = rest
        return bool(end)

    def _formula(self, line: str, end: str, rest: str, whole: bool) -> bool:
        if not whole:
            return False
        if line.strip().endswith(self._fence[1]):
            self._fence = None
        self._pen.verbatim(line)
        self._at_start = bool(end)
        if end:
            self._pen.end_line()
        self._text = rest
        return True

    def _inline(self, line: str, end: str, rest: str, whole: bool) -> bool:
        left = self._spans(line, self._style, whole)
        if not whole:
            self._text = left
            return False
        self._text = rest
        if end:
            self._pen.end_line()
            self._at_start = True
        return True

    def _spans(self, text: str, style: Style, whole: bool) -> str:
        """Draws the text of a line; -> what has to wait for more of it (nothing if it is whole)."""
        while text:
            found = _SPECIAL.search(text)
            self._put(text[: found.start()] if found else text, style)
            text = text[found.start() :] if found else ""
            if not text:
                break
            found, more = self._span(text)
            waits = len(text) < _LONGEST and not whole
            if found and not (waits and found.end() == len(text)):  # what comes next may decide otherwise
                self._draw_span(found, style | more)
                text = text[found.end() :]
            elif waits and (found or self._may_open(text)):
                return text
            else:
                run = len(text) - len(text.lstrip(text[0]))
                self._put(text[:run], style)
                text = text[run:]
        return ""

    def _span(self, text: str) -> tuple[re.Match[str] | None, Style]:
        """The code, formula, link or emphasis that the text begins with, if there is one, and its style."""
        near = text[:_LONGEST]
        for pattern, more in _SPANS:
            found = pattern.match(near)
            if found:
                beside = self._before + text[found.end() : found.end() + 1]
                if text[0] != "_" or not any(map(str.isalnum, beside)):
                    return found, more
        return None, PLAIN

    def _draw_span(self, found: re.Match[str], style: Style) -> None:
        if found.re is _CODE:
            code = found[2]
            self._put(code[1:-1] if code[0] == code[-1] == " " and code.strip() else code, style)
        elif found.re is _FORMULA:
            self._put(found.group(), style)
        elif found.re is _ESCAPED:
            self._put(found[1], style)
        elif found.re is _LINK:
            self._spans(found[1], style, True)
            if found[2] and found[2] != found[1]:
                self._put(f" ({found[2]})", style - UNDERLINED)
        else:
            self._spans(found[2], style, True)

    def _may_open(self, text: str) -> bool:
        """Whether what begins here may be a span once more of it has come."""
        run = text.lstrip(text[0])
        if text[0] == "!":
            return not run or run[0] == "["
        if text[0] == "\\":
            return len(text) < 2 or text[1] in "(["
        if text[0] == "[":
            closed = text.find("]")
            return closed < 0 or len(text) <= closed + 1 or text[closed + 1] == "("
        if text[0] == "~" and run and len(text) - len(run) < 2:
            return False
        if text[0] == "_" and self._before.isalnum():
            return False
        return not run or text[0] == "`" or not run[0].isspace()

    def _put(self, text: str, style: Style) -> None:
        if text:
            self._pen.put(text, style)
            self._before = text[-1]

    def _rule(self, title: str = "") -> None:
        columns = min(self._pen.columns, 60) - 1
        text = f"{self._dash * 2} {title} " if title else ""
        self._pen.verbatim(text[:columns] + self._dash * (columns - width(text)), DIM)
        self._pen.end_line()
        self._at_start = True

    def _draw_rows(self) -> None:
        rows, self._rows = self._rows, []
        self._pen.hang = 0
        if len(rows) < 2:  # a line that begins with a bar, and no table
            for row in rows:
                self._spans(row, PLAIN, True)
                self._pen.end_line()
            return
        cells = [[cell.replace("\\|", "|") for cell in _cells(row)] for row in rows]
        columns = len(cells[0])
        right = [cell.endswith(":") for cell in cells.pop(1)] + [False] * columns
        cells = [[*row, *[""] * columns][:columns] for row in cells]
        widths = [max(self._shown_width(row[at]) for row in cells) for at in range(columns)]
        if sum(widths) + 3 * (columns - 1) > self._pen.columns:
            self._draw_as_list(cells)
            return
        for number, row in enumerate(cells):
            for at, cell in enumerate(row):
                space = " " * (widths[at] - self._shown_width(cell))
                self._pen.put((f" {self._bar}" if at else "") + (space if right[at] else ""), DIM)
                self._spans(cell, BOLD if number == 0 else PLAIN, True)
                self._pen.put("" if right[at] or at == columns - 1 else space)
            self._pen.end_line()
            if number == 0:
                self._pen.verbatim(f"{self._dash}{'┼' if self._dash == '─' else '+'}{self._dash}".join(
                    self._dash * size for size in widths), DIM)
                self._pen.end_line()

    def _draw_as_list(self, cells: list[list[str]]) -> None:
        """A table that is wider than the terminal: row by row, each cell after its column's name."""
        header, *rows = cells
        for number, row in enumerate(rows):
            if number:
                self._pen.end_line()
            for name, cell in zip(header, row, strict=True):
                self._spans(name, BOLD, True)
                self._pen.put(": ")
                self._spans(cell, PLAIN, True)
                self._pen.end_line()

    def _shown_width(self, cell: str) -> int:
        """Cells that it takes once its marks are drawn."""
        shown: list[str] = []
        aside = Drawing(Pen(shown.append, lambda: 1 << 30, lambda *styles: ""))
        aside._spans(cell, PLAIN, True)
        aside._pen.flush(trailing=True)
        return width("".join(shown))


def _begins_fence(line: str) -> bool:
    return line.lstrip().startswith(("```", "~~~"))


def _cells(row: str) -> list[str]:
    row = row.strip().removeprefix("|")
    row = row[:-1] if row.endswith("|") and not row.endswith("\\|") else row
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)]
