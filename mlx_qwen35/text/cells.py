"""Text on a terminal's grid of cells: how wide it is, where a line breaks, and what must not reach a terminal.

Knows columns, words and control characters. Knows nothing of terminals themselves, nor of what the text says.
"""

from __future__ import annotations

import re
from collections.abc import Callable

_SIMPLE = re.compile(r"[\x20-\x7e]*")
_PIECES = re.compile(r"\n|[ ]+|[^\n ]+")
# Everything of Unicode's category Cc but the line end and the tab, and what turns the direction of what follows.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

_FEWEST = 8  # columns that are reckoned with

Style = frozenset[str]
PLAIN: Style = frozenset()


def harmless(text: str) -> str:
    """The text with a visible sign for each control character, so that what a model writes cannot steer a terminal."""
    return _CONTROL.sub(lambda found: _sign(ord(found.group())), text.replace("\r\n", "\n"))


def _sign(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"\\u{code:04x}"


def width(text: str) -> int:
    """Cells that a text takes: 2 for a wide character, 0 for one that joins the one before."""
    if _SIMPLE.fullmatch(text):
        return len(text)
    from wcwidth import wcswidth

    return max(wcswidth(text), 0)


class Pen:
    """Writes text that comes in pieces, and breaks lines between words; nothing written is ever taken back.

    What is held back is the last word, until it is certain that it has ended. hang: cells that a broken line is
    indented by.
    """

    def __init__(
        self, write: Callable[[str], object], columns: Callable[[], int], change: Callable[[Style, Style], str]
    ) -> None:
        """columns: asked at each word, for a window may be resized. change: what a terminal is sent between text of one
        style and of another."""
        self._write, self._columns, self._change = write, columns, change
        self._word: list[tuple[str, Style]] = []
        self._space: tuple[str, Style] = ("", PLAIN)
        self._style = PLAIN
        self.column = 0
        self.hang = 0

    @property
    def columns(self) -> int:
        return max(self._columns(), _FEWEST)

    def put(self, text: str, style: Style = PLAIN) -> None:
        """Text without control characters but line ends and tabs."""
        for piece in _PIECES.findall(text.replace("\t", "    ")):
            if piece == "\n":
                self.end_line()
            elif piece.isspace():
                self.flush()
                self._space = (self._space[0] + piece, style)
            elif _SIMPLE.fullmatch(piece):
                self._word.append((piece, style))
            else:
                self._put_wide(piece, style)

    def verbatim(self, text: str, style: Style = PLAIN) -> None:
        """A piece of a line that is not to be broken, but where the terminal does it."""
        self.flush(trailing=True)
        if text:
            self._draw(text, style)
            self.column += width(text.replace("\t", "    "))

    def end_line(self) -> None:
        self.flush()
        self._space = ("", PLAIN)
        self._write("\n")
        self.column = 0

    def flush(self, *, trailing: bool = False) -> None:
        """Writes the word that was held back; with `trailing`, the space after it too."""
        if self._word:
            wide = width("".join(text for text, _ in self._word))
            space, columns = self._space[0], self.columns
            if self.column > self.hang and self.column + len(space) + wide > columns:
                self._write("\n" + " " * self._indent(columns))
                self.column = self._indent(columns)
            else:
                self._write_space()
            for text, style in self._word:
                self._draw(text, style)
            self.column += wide
            if self.column > columns:  # longer than a line: the terminal broke it
                self.column = (self.column - 1) % columns + 1
            self._word, self._space = [], ("", PLAIN)
        if trailing:
            self._write_space()
            self._space = ("", PLAIN)

    def end(self) -> None:
        """Writes what was held back, and leaves the terminal in its plain style, wherever in a line."""
        self.flush()
        self._draw("", PLAIN)

    def _draw(self, text: str, style: Style) -> None:
        if style != self._style:
            self._write(self._change(self._style, style))
            self._style = style
        self._write(text)

    def _indent(self, columns: int) -> int:
        return self.hang if self.hang <= columns // 2 else 0

    def _write_space(self) -> None:
        text, style = self._space
        if text:
            self._draw(text, style)
            self.column += len(text)

    def _put_wide(self, piece: str, style: Style) -> None:
        """A piece with characters outside of ASCII: a line may break before and after a wide one, which is how
        languages without spaces are written."""
        from wcwidth import wcwidth

        at = 0
        for number, character in enumerate(piece):
            if wcwidth(character) == 2:
                self._word += [(piece[at:number], style)] if number > at else []
                self.flush()
                self._word.append((character, style))
                at = number + 1
            elif at == number and self._word and wcwidth(character) == 0:
                self._word[-1] = (self._word[-1][0] + character, style)
                at = number + 1
        if at < len(piece):
            self._word.append((piece[at:], style))
