"""The rules of a GBNF grammar, written in Lark so that they mean the same.

Lark's lexer takes the longest word that fits and never takes it back. So a grammar without recursion becomes one word,
and in any other each character is one, but for what can be told to be a word whatever stands around it: nothing else
begins with any of its first characters, and none of its texts is the beginning of another (a string in quotes).
Knows nothing of how GBNF is spelled.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

Ranges = tuple[tuple[int, int], ...]  # of characters, both ends included
_LONGEST = 100_000  # characters of an expression
_MANY = 2_000  # states of an automaton
_TIMES = re.compile(r"\{(\d+)(,?)(\d*)\}")
_LAST = 0x10FFFF


@dataclass
class Node:
    """kind: "one" character, by an expression and as ranges; a "row" of parts; a "choice" of them; one part some
    "times"; a "rule" by its name; a "word", by an expression, of which ranges has the first characters."""

    kind: str
    text: str = ""
    parts: list[Node] = field(default_factory=list)
    ranges: Ranges = ()


def without(ranges: Ranges) -> Ranges:
    """All other characters."""
    found, at = [], 0
    for low, high in sorted(ranges):
        if low > at:
            found.append((at, low - 1))
        at = max(at, high + 1)
    return (*found, *([(at, _LAST)] if at <= _LAST else []))


def lark_of_rules(rules: Mapping[str, Node]) -> str:
    """The grammar that begins with the rule "root"."""
    whole = _expression(Node("rule", "root"), rules, {})
    if whole is not None:
        return f"start: TEXT\nTEXT: /{whole}/\n"
    rules = _with_words(rules)
    # Numbers, for Lark takes some names, and a name's capitals, for something else.
    numbers = {name: f"r{at}" for at, name in enumerate(rules)}
    lines = [f"{numbers[name]}: {_rule(body, numbers)}" for name, body in rules.items()]
    return "\n".join([f"start: {numbers['root']}", *lines, ""])


def _rule(node: Node, numbers: Mapping[str, str]) -> str:
    inner = [_rule(part, numbers) for part in node.parts]
    if node.kind in ("one", "word"):
        return f"/{node.text}/"
    if node.kind == "rule":
        return numbers[node.text]
    if node.kind == "times":
        return f"({inner[0]}){node.text}"
    return f"({' | '.join(inner)})" if node.kind == "choice" else " ".join(inner) or '""'


def _expression(node: Node, rules: Mapping[str, Node], known: dict[str, str | None]) -> str | None:
    """As a regular expression; None: a rule is inside itself, or it would be too long. known: of the rules so far."""
    if node.kind == "one":
        return node.text
    if node.kind == "rule":
        if node.text not in known:
            known[node.text] = None  # as long as it is being written: it may be inside itself
            known[node.text] = _expression(rules[node.text], rules, known)
        return known[node.text]
    written: list[str] = []
    for part in node.parts:
        inner = _expression(part, rules, known)
        if inner is None or len(inner) + sum(map(len, written)) > _LONGEST:
            return None
        written.append(inner)
    if node.kind == "times":
        return f"(?:{written[0]}){node.text}"
    return f"(?:{'|'.join(written)})" if node.kind == "choice" else "".join(written)


# Words


def _with_words(rules: Mapping[str, Node]) -> Mapping[str, Node]:
    """The same rules, with words where they can be."""
    refused: set[str] = set()
    while True:
        made = {name: _grouped(body, rules, refused) for name, body in rules.items()}
        beginnings: dict[str, Ranges] = {}
        for node in _reached(made):
            if node.kind in ("one", "word"):
                beginnings[node.text] = node.ranges
        words = {node.text for node in _reached(made) if node.kind == "word"}
        taken = {
            word
            for word in words
            if any(_meet(beginnings[word], ranges) for text, ranges in beginnings.items() if text != word)
        }
        if not taken:
            return made
        refused |= taken


def _grouped(node: Node, rules: Mapping[str, Node], refused: set[str]) -> Node:
    if node.kind != "row":
        return Node(node.kind, node.text, [_grouped(part, rules, refused) for part in node.parts], node.ranges)
    parts: list[Node] = []
    at = 0
    while at < len(node.parts):
        for end in range(len(node.parts), at, -1):
            word = _word(node.parts[at:end], rules)
            if word is not None and word.text not in refused:
                parts.append(word)
                at = end
                break
        else:
            parts.append(_grouped(node.parts[at], rules, refused))
            at += 1
    return Node("row", parts=parts)


def _word(parts: list[Node], rules: Mapping[str, Node]) -> Node | None:
    """A word, if none of its texts begins another. Only what repeats is worth one."""
    if not any(part.kind == "times" for part in parts):
        return None
    row = Node("row", parts=parts)
    text = _expression(row, rules, {})
    if text is None:
        return None
    automaton = _Automaton(rules)
    try:
        end = automaton.add(row, 0)
        first = automaton.first_if_no_text_begins_another(end)
    except _TooLarge:
        return None
    return None if first is None else Node("word", text, ranges=first)


def _reached(rules: Mapping[str, Node]) -> Iterator[Node]:
    seen: set[str] = set()
    ahead = [Node("rule", "root")]
    while ahead:
        node = ahead.pop()
        yield node
        ahead += node.parts
        if node.kind == "rule" and node.text not in seen:
            seen.add(node.text)
            ahead.append(rules[node.text])


def _meet(first: Ranges, second: Ranges) -> bool:
    return any(low <= other_high and other_low <= high for low, high in first for other_low, other_high in second)


class _TooLarge(Exception):
    pass


class _Automaton:
    """States from 0 on, with steps over characters and steps over nothing."""

    def __init__(self, rules: Mapping[str, Node]) -> None:
        self._rules = rules
        self._steps: list[list[tuple[Ranges, int]]] = [[]]
        self._free: list[list[int]] = [[]]

    def add(self, node: Node, start: int) -> int:
        """Adds what a node, which has no recursion, matches from a state on; returns the state behind it."""
        if node.kind == "one":
            end = self._state()
            self._steps[start].append((node.ranges, end))
            return end
        if node.kind == "rule":
            return self.add(self._rules[node.text], start)
        if node.kind == "row":
            for part in node.parts:
                start = self.add(part, start)
            return start
        if node.kind == "choice":
            ends = [self.add(part, self._behind(start)) for part in node.parts]
            end = self._state()
            for each in ends:
                self._free[each].append(end)
            return end
        return self._repeated(node, start)

    def _repeated(self, node: Node, start: int) -> int:
        least, most = _bounds(node.text)
        for _ in range(least):
            start = self.add(node.parts[0], start)
        if most is None:
            loop = self._behind(start)
            self._free[self.add(node.parts[0], loop)].append(loop)
            return self._behind(loop)
        end = self._state()
        for _ in range(most - least):
            self._free[start].append(end)
            start = self.add(node.parts[0], self._behind(start))
        self._free[start].append(end)
        return end

    def _state(self) -> int:
        if len(self._steps) >= _MANY:
            raise _TooLarge
        self._steps.append([])
        self._free.append([])
        return len(self._steps) - 1

    def _behind(self, state: int) -> int:
        self._free[state].append(self._state())
        return len(self._steps) - 1

    def first_if_no_text_begins_another(self, end: int) -> Ranges | None:
        """The first characters; None: a text begins another, or is empty."""
        start = self._closed({0})
        first = tuple(each for state in start for ranges, _ in self._steps[state] for each in ranges)
        ahead, seen = [start], {start}
        while ahead:
            states = ahead.pop()
            steps = [step for state in states for step in self._steps[state]]
            if end in states and (states is start or any(ranges for ranges, _ in steps)):
                return None
            edges = sorted({low for ranges, _ in steps for low, _ in ranges} | {h + 1 for r, _ in steps for _, h in r})
            nexts: list[set[int]] = [set() for _ in edges]
            for ranges, target in steps:
                for low, high in ranges:
                    for at in range(bisect_right(edges, low) - 1, bisect_right(edges, high)):
                        nexts[at].add(target)
            for targets in nexts:
                closed = self._closed(targets)
                if closed and closed not in seen:
                    if len(seen) >= _MANY:
                        raise _TooLarge
                    seen.add(closed)
                    ahead.append(closed)
        return first

    def _closed(self, states: set[int]) -> frozenset[int]:
        found, ahead = set(states), list(states)
        while ahead:
            for state in self._free[ahead.pop()]:
                if state not in found:
                    found.add(state)
                    ahead.append(state)
        return frozenset(found)


def _bounds(times: str) -> tuple[int, int | None]:
    known: dict[str, tuple[int, int | None]] = {"*": (0, None), "+": (1, None), "?": (0, 1)}
    if times in known:
        return known[times]
    least, comma, most = _TIMES.fullmatch(times).groups()
    return int(least), int(most) if most else None if comma else int(least)
