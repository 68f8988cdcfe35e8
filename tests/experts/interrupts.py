"""Ctrl-C wherever Python may deliver one.

Knows where CPython looks for signals: where a function begins, at the end of a call, and where a loop turns back. Knows
of the package only that its files are in its folder.

What is raised here comes before the next instruction, where Python's own comes at the end of the last one. Where the
two have different handlers (at the end of a `with`), that would be an interrupt that Python never makes: left out.
"""

from __future__ import annotations

import dis
import sys
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

from tests.conftest import CHECKOUT

_PACKAGE = str(CHECKOUT / "mlx_qwen35")
_LOOKS = ("CALL", "RESUME", "JUMP_BACKWARD", "JUMP_ABSOLUTE")  # how the names of such instructions begin


class Interrupt:
    """A KeyboardInterrupt at the point number `at` of what this thread runs inside; None: count the points only.

    with Interrupt() as points: work()            points.count
    with Interrupt(17): work()                    raises KeyboardInterrupt, if work has that many
    """

    def __init__(self, at: int | None = None):
        self.count, self._at = 0, at

    def __enter__(self) -> Interrupt:
        sys.settrace(self._called)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _called(self, frame: FrameType, event: str, value: Any) -> Any:
        if not frame.f_code.co_filename.startswith(_PACKAGE):
            return None
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        looks, looked = _looking(frame.f_code), True

        def before(frame: FrameType, event: str, value: Any) -> Any:
            nonlocal looked
            if event == "opcode":
                if looked:
                    self._point()
                looked = frame.f_lasti in looks
            return before

        return before

    def _point(self) -> None:
        if self.count == self._at:
            sys.settrace(None)
            raise KeyboardInterrupt
        self.count += 1


@cache
def _looking(code: CodeType) -> frozenset[int]:
    """Where in the code those instructions are, whose handler is that of the instruction behind them."""
    entries = getattr(dis.Bytecode(code), "exception_entries", ())  # not before Python 3.11, which did not need them

    def handler(offset: int) -> object:
        return next((e.target for e in entries if e.start <= offset < e.end), None)

    behind = {one.offset: two.offset for one, two in pairwise(dis.get_instructions(code))}
    looks = (i.offset for i in dis.get_instructions(code) if i.opname.startswith(_LOOKS))
    return frozenset(at for at in looks if at in behind and handler(at) == handler(behind[at]))
