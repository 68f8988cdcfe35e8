"""Random JSON schemas over the keywords that forms support, and random tools."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from mlx_qwen35.grammar.formats import FORMATS

NAMES = ("a", "b2", "name", "é ü", 'q"uote', "back\\slash", "<think>", "line\nend", "$ref", "x" * 30, "日本", "type")
WORDS = ("", "red", "<|im_end|>", "</think>", 'a "b"', "c\\d", "tab\t", "ß😀", "true", "1", "null", "[]", "a/b", "</a>")
PATTERNS = (
    "^[a-c]+$",
    "b",
    "^x",
    "[0-9]$",
    "^(ab|cd){1,3}$",
    r"^\w+-\d{2,4}$",
    "^a.c$|^e",
    r"^[^<>]{2,}$",
    "[A-Z]{2}|z$",
    '^[^"]*$',
    r"^[^\\\s]+$",
)
_Made = dict[str, Any]


class Schemas:
    """Made by a seed. schema(): a JSON schema; tools(): some tools in one of the forms that they are given in."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._definitions: _Made = {}

    def schema(self) -> _Made:
        self._definitions = {}
        made = self._some(0)
        if self._definitions:
            made = {**made, "$defs": self._definitions}
        return made

    def tools(self) -> list[_Made]:
        tools = []
        for at in range(self._random.randint(1, 3)):
            self._definitions = {}
            names = [name for name in self._pick(("city", "path", "old_text", "n", "opts", "unit", "日本"), 0, 5)]
            properties = {name: self._parameter() for name in names}
            parameters: _Made = {"type": "object", "properties": properties}
            if names:
                parameters["required"] = self._pick(names, 0, len(names))
            if self._definitions:
                parameters["$defs"] = self._definitions
            function = {"name": f"tool_{at}", "description": "does it", "parameters": parameters}
            tools.append({"type": "function", "function": function} if self._chance(0.8) else function)
        return tools

    def _chance(self, p: float) -> bool:
        return self._random.random() < p

    def _pick(self, values: Any, least: int, most: int) -> list[Any]:
        return self._random.sample(list(values), self._random.randint(least, min(most, len(values))))

    def _some(self, depth: int) -> _Made:
        kinds: list[Callable[[int], _Made]] = [
            self._string, self._string, self._integer, self._number, self._plain, self._listed, self._listed,
        ]  # fmt: skip
        if depth < 3:
            kinds += [self._object, self._object, self._object, self._array, self._array, self._union, self._merged]
            kinds += [self._reference, self._one_of, self._anything]
        made = self._random.choice(kinds)(depth)
        if self._chance(0.1):
            made = {**made, "title": "T", "description": "says nothing", "default": None, "x-order": 1}
        return made

    def _parameter(self) -> _Made:
        """As tools describe their parameters."""
        kind = self._random.randrange(10)
        if kind < 3:
            return self._string(3)
        if kind == 3:
            return self._random.choice([self._plain(0), {"type": "integer"}, {"type": "number"}, {}])
        if kind == 4:
            return self._random.choice([self._integer, self._number])(0)
        if kind == 5:
            return self._listed(0)
        if kind == 6:
            others = [{"type": "null"}, {"type": "integer"}, {"type": "array", "items": {"type": "integer"}}]
            return {"anyOf": [{"type": "string"}, *self._pick([*others, {"type": "boolean"}], 1, 2)]}
        if kind == 7:
            return {"type": self._pick(("string", "number", "null", "boolean"), 1, 3)}
        self._depth = 0
        return self._random.choice([self._array, self._object, self._reference])(1)

    def _string(self, depth: int) -> _Made:
        made: _Made = {"type": "string"}
        kind = self._random.randrange(5)
        if kind == 0:
            made["pattern"] = self._random.choice(PATTERNS)
        elif kind == 1:
            made["format"] = self._random.choice([*FORMATS, "password"])
        elif kind == 2:
            least = self._random.randrange(4)
            if self._chance(0.5):
                made["minLength"] = least
            if self._chance(0.7):
                made["maxLength"] = least + self._random.randrange(8)
        if kind == 0 and self._chance(0.3):
            made["minLength"] = 2
        return made

    def _bounds(self, make: Callable[[], int | float]) -> _Made:
        low, high = sorted((make(), make()))
        made: _Made = {}
        if self._chance(0.5):
            made[self._random.choice(("minimum", "exclusiveMinimum"))] = low
        if self._chance(0.5):
            made[self._random.choice(("maximum", "exclusiveMaximum"))] = high + 3
        return made

    def _integer(self, depth: int) -> _Made:
        made = {"type": "integer", **self._bounds(lambda: self._random.randint(-200, 2000))}
        if self._chance(0.2):
            made = {"type": "integer", "multipleOf": self._random.choice((2, 3, 10))}
        return made

    def _number(self, depth: int) -> _Made:
        return {
            "type": "number",
            **self._bounds(lambda: round(self._random.uniform(-50, 500), self._random.randrange(4))),
        }

    def _plain(self, depth: int) -> _Made:
        return {"type": self._random.choice(("boolean", "null", ["boolean", "null"]))}

    def _listed(self, depth: int) -> _Made:
        values = [*WORDS, 0, 1, -5, 2.5, True, False, None]
        if depth and self._chance(0.2):
            values += [[1, "a"], {"k": [True]}]
        if self._chance(0.3):
            return {"const": self._random.choice(values)}
        if self._chance(0.5):
            return {"type": "string", "enum": self._pick(WORDS, 1, 5)}
        return {"enum": self._pick(values, 1, 6)}

    def _object(self, depth: int) -> _Made:
        names = self._pick(NAMES, 0, 4)
        made: _Made = {"type": "object", "properties": {name: self._some(depth + 1) for name in names}}
        if names and self._chance(0.7):
            made["required"] = self._pick(names, 0, len(names))
        kind = self._random.randrange(6)
        if kind < 3:
            made["additionalProperties"] = False
        elif kind == 3:
            made["additionalProperties"] = self._some(depth + 1)
        elif kind == 4 and self._chance(0.5):
            made["patternProperties"] = {"^k[0-9]+$": self._some(depth + 1)}
            made["additionalProperties"] = False
        if not names and self._chance(0.5):
            made = {"type": "object", "additionalProperties": self._some(depth + 1), "maxProperties": 3}
        return made

    def _array(self, depth: int) -> _Made:
        made: _Made = {"type": "array"}
        if self._chance(0.8):
            made["items"] = self._some(depth + 1)
        least = self._random.randrange(3)
        if self._chance(0.4):
            made["minItems"] = least
        if self._chance(0.4):
            made["maxItems"] = least + self._random.randrange(3)
        if self._chance(0.2):
            made["prefixItems"] = [self._some(depth + 1) for _ in range(self._random.randint(1, 3))]
            made["items"] = self._random.choice((False, self._some(depth + 1)))
            made.pop("minItems", None)
        if self._chance(0.1):
            made["uniqueItems"] = False
        return made

    def _union(self, depth: int) -> _Made:
        return {"anyOf": [self._some(depth + 1) for _ in range(self._random.randint(1, 3))]}

    def _one_of(self, depth: int) -> _Made:
        parts = [self._string(depth), self._array(depth + 1), self._object(depth + 1), self._integer(depth)]
        return {"oneOf": self._pick([*parts, {"type": "null"}], 1, 3)}

    def _merged(self, depth: int) -> _Made:
        first, second = self._pick(NAMES, 2, 2)
        parts: list[_Made] = [
            {"type": "object", "properties": {first: self._some(depth + 1)}, "required": [first]},
            {"properties": {second: self._some(depth + 1)}, "required": [second]},
        ]
        return self._random.choice((
            {"allOf": parts},
            {"allOf": parts[:1]},
            {**parts[0], "allOf": parts[1:]},
            {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 50}]},
            {"allOf": [{"type": "string", "minLength": 2}, {"pattern": "^[a-z]*$"}]},
            {**parts[0], "anyOf": [{"required": [second]}, {"properties": {second: {"type": "integer"}}}]},
        ))  # fmt: skip

    def _reference(self, depth: int) -> _Made:
        name = self._random.choice(("node", "thing", "odd/name~x"))
        pointer = {"$ref": "#/$defs/" + name.replace("~", "~0").replace("/", "~1")}
        if name not in self._definitions:
            self._definitions[name] = True
            if name == "node":
                node: _Made = {
                    "type": "object",
                    "properties": {"v": self._plain(0), "next": pointer},
                    "required": ["v"],
                }
                self._definitions[name] = {**node, "additionalProperties": False}
            else:
                self._definitions[name] = self._some(max(depth + 1, 2))
        return pointer

    def _anything(self, depth: int) -> _Made:
        return self._random.choice(({}, {"type": "object"}, {"type": "array"}, {"type": ["string", "integer"]}))
