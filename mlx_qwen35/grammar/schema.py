"""JSON schemas, checked and put into the words that llguidance follows as the standard means them.

What would be followed otherwise, or not at all, is refused by its name and its place, before anything is computed.
Knows JSON Schema; knows nothing of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.grammar.formats import FORMATS, NUMBERS, UNCHECKED
from mlx_qwen35.grammar.regex import found, without

TYPES = frozenset(("null", "boolean", "integer", "number", "string", "array", "object"))
REMARKS = frozenset(
    "title description default example examples deprecated readOnly writeOnly nullable discriminator externalDocs xml "
    "$schema $id id $comment $defs definitions $vocabulary contentMediaType contentEncoding contentSchema".split()
)
_COUNTS = frozenset("minLength maxLength minItems maxItems minProperties maxProperties".split())
_BOUNDS = frozenset("minimum maximum exclusiveMinimum exclusiveMaximum multipleOf".split())
_UNIONS = frozenset(("anyOf", "oneOf", "allOf"))
# Whole numbers without a bound end somewhere: Python reads no more than 4,300 digits, most other languages 19.
_LARGEST = 10**18
# What a text in a call must not hold to be read as it is: the beginnings of tags that may be the call's own.
TAGS = ("<parameter", "</parameter", "<function", "<tool_call>")
_EXACT = 2**53  # llguidance keeps numbers as doubles


_NO_TAGS = f"^(?:{without(TAGS)})$"


class Schema:
    """One schema, with all that it refers to.

    root: as given; where: what it is called in errors; inside_call: its strings stand in a call's parameter, and hold
    nothing that could be a tag of it; its numbers have an end. Raises ArgumentError for what cannot be followed.
    """

    def __init__(self, root: Any, where: str, *, inside_call: bool = False) -> None:
        self.root, self._where, self._inside_call = root, where, inside_call
        self._names: dict[str, str] = {}  # of what is referred to, by its pointer
        self._definitions: dict[str, Any] = {}

    def part(self, value: Any, path: str = "#") -> dict[str, Any] | bool:
        """A part of the schema as llguidance takes it, complete by itself."""
        made = self._made(value, path)
        self._check_all(made, path)
        if isinstance(made, dict) and self._definitions:
            return {**made, "$defs": self._definitions}
        return made

    def whole(self) -> dict[str, Any] | bool:
        return self.part(self.root)

    def checked(self, value: Any, path: str) -> Mapping[str, Any]:
        """The same part as it is given, if it can be followed."""
        self._check_all(self._made(value, path), path)
        return {} if isinstance(value, bool) else value

    def resolve(self, reference: Any, path: str) -> Any:
        """What a "$ref" means."""
        if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
            raise self.refusal(path, f'"$ref": {reference!r} is not within the schema; put what it means into "$defs"')
        value = self.root
        for step in reference.split("/")[1:]:
            step = step.replace("~1", "/").replace("~0", "~")
            if isinstance(value, Mapping) and step in value:
                value = value[step]
            elif isinstance(value, list) and step.isdigit() and int(step) < len(value):
                value = value[int(step)]
            else:
                raise self.refusal(path, f'"$ref": {reference!r} leads nowhere; correct it')
        return value

    def refusal(self, path: str, what: str) -> ArgumentError:
        return ArgumentError(f"{self._where} at {path}: {what}")

    def _made(self, value: Any, path: str, *, part: bool = False) -> dict[str, Any] | bool:
        """part: it is one of a union, and what it does not say may be said beside it."""
        if value is True and self._inside_call and not part:
            return self._anything()
        if isinstance(value, bool):
            return value
        if not isinstance(value, Mapping):
            raise self.refusal(path, f"{_shown(value)} is no schema; a schema is an object, true or false")
        types = self._types(value, path)
        made: dict[str, Any] = {}
        if types is not None:
            made["type"] = types[0] if len(types) == 1 else types
        patterns = []
        for key, inner in value.items():
            here = f"{path}/{key}"
            if key in REMARKS or (isinstance(key, str) and key.startswith("x-")) or key == "type":
                continue
            if key == "uniqueItems" and inner is False:
                continue
            if key == "$ref":
                made[key] = self._reference(inner, path)
            elif key in _UNIONS:
                parts = enumerate(self._list(inner, here))
                made[key] = [self._made(each, f"{here}/{at}", part=True) for at, each in parts]
            elif key in ("const", "enum"):
                made[key] = inner
                self._check_literals([inner] if key == "const" else self._list(inner, here), here)
            elif key in _COUNTS:
                made[key] = self._count(inner, here)
            elif key in _BOUNDS:
                made[key] = self._bound(key, inner, here)
            elif key in ("properties", "patternProperties"):
                made[key] = self._properties(key, inner, here)
            elif key == "required":
                made[key] = self._required(inner, here)
            elif key in ("items", "additionalItems", "prefixItems"):
                self._items(key, inner, value, made, here)
            elif key == "additionalProperties":
                made[key] = self._made(inner, here)
            elif key == "pattern":
                patterns.append(self.pattern(inner, here))
            elif key == "format":
                patterns += self._format(inner, types, made, here)
            else:
                raise self.refusal(path, f"{key!r} is not supported in a form; leave it out")
        listed = bool(made.keys() & {"const", "enum"})
        if self._inside_call and not listed and types is not None and "string" in types:
            patterns.append(_NO_TAGS)
        self._add_patterns(made, patterns)
        self._check_properties(made, path)
        if types is not None and not listed:
            self._bound_numbers(made, types)
        if self._inside_call and not part:
            self._describe(made, types)
            if not made:
                return self._anything()
        if "oneOf" in made and self._tells_apart(made["oneOf"]):
            if "anyOf" in made:
                made.setdefault("allOf", []).append({"anyOf": made.pop("oneOf")})
            else:
                made["anyOf"] = made.pop("oneOf")
        return made

    def _bound_numbers(self, made: dict[str, Any], types: Sequence[str]) -> None:
        whole = "integer" in types and "number" not in types
        if whole or ("number" in types and (self._inside_call or made.keys() & _BOUNDS)):
            if "exclusiveMinimum" not in made:
                made["minimum"] = max(made.get("minimum", -_LARGEST), -_LARGEST)
            if "exclusiveMaximum" not in made:
                made["maximum"] = min(made.get("maximum", _LARGEST), _LARGEST)

    def _describe(self, made: dict[str, Any], types: Sequence[str] | None) -> None:
        """Arrays and objects whose inside is not described."""
        if types is None or made.keys() & (_UNIONS | {"$ref", "const", "enum"}):
            return
        if "array" in types:
            made.setdefault("items", self._anything())
        if "object" in types and made.get("additionalProperties", True) is True:
            made["additionalProperties"] = self._anything()

    def _anything(self) -> dict[str, Any]:
        """Any value that can stand in a call."""
        reference = {"$ref": "#/$defs/any"}
        self._definitions["any"] = {
            "anyOf": [
                {"type": ["null", "boolean"]},
                {"type": "number", "minimum": -_LARGEST, "maximum": _LARGEST},
                {"type": "string", "pattern": _NO_TAGS},
                {"type": "array", "items": reference},
                {"type": "object", "additionalProperties": reference},
            ]
        }
        return reference

    def _types(self, value: Mapping[str, Any], path: str) -> list[str] | None:
        if "type" not in value:
            return None
        declared = value["type"]
        types = list(declared) if isinstance(declared, list) else [declared]
        for name in types:
            if name not in TYPES:
                raise self.refusal(path, f'"type": {_shown(declared)} is none of {", ".join(sorted(TYPES))}')
        if not types:
            raise self.refusal(path, '"type" is an empty list; name a type')
        return types

    def _reference(self, reference: Any, path: str) -> str:
        target = self.resolve(reference, path)
        if reference not in self._names:
            name = self._names[reference] = f"d{len(self._names)}"
            self._definitions[name] = True  # it may refer to itself
            self._definitions[name] = self._made(target, reference)
        return f"#/$defs/{self._names[reference]}"

    def _check_all(self, made: Any, path: str) -> None:
        done: set[str] = set()
        self._check_loops(made, path, done, ())
        for reference, name in self._names.items():
            self._check_loops({"$ref": f"#/$defs/{name}"}, reference, done, ())

    def _check_loops(self, made: Any, path: str, done: set[str], within: tuple[str, ...]) -> None:
        """Whether a schema is itself again before it has said anything: what it means is nowhere said."""
        if not isinstance(made, dict):
            return
        name = made.get("$ref")
        if name in within:
            raise self.refusal(path, "it refers to itself before it says what it is; describe a type")
        if name is not None and name not in done:
            self._check_loops(self._definitions[name.rpartition("/")[2]], path, done, (*within, name))
            done.add(name)
        for word in _UNIONS & made.keys():
            for part in made[word]:
                self._check_loops(part, path, done, within)

    def _list(self, value: Any, path: str) -> list[Any]:
        if not isinstance(value, (list, tuple)) or not value:
            raise self.refusal(path, f"{_shown(value)} is not a list with something in it")
        return list(value)

    def _count(self, value: Any, path: str) -> int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.refusal(path, f"{_shown(value)} is not a whole number from 0 on")
        return value

    def _bound(self, key: str, value: Any, path: str) -> int | float:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.refusal(path, f"{_shown(value)} is not a finite number")
        if key == "multipleOf":
            if value <= 0:
                raise self.refusal(path, f"{value} is not above 0")
            return value
        lowest = key in ("minimum", "exclusiveMinimum")
        if (value > _LARGEST) if lowest else (value < -_LARGEST):
            raise self.refusal(path, f"{value} leaves no number within {_LARGEST}; take a smaller one")
        value = min(max(value, -_LARGEST), _LARGEST)
        if isinstance(value, int) and float(value) != value:
            # To the double on the allowed side.
            near = float(value)
            if near < value and lowest:
                near = math.nextafter(near, math.inf)
            elif near > value and not lowest:
                near = math.nextafter(near, -math.inf)
            return near
        return value

    def _check_literals(self, values: Iterable[Any], path: str) -> None:
        for value in values:
            if isinstance(value, Mapping):
                for key in value:
                    self._check_text(key, path)
                self._check_literals(value.values(), path)
            elif isinstance(value, (list, tuple)):
                self._check_literals(value, path)
            elif isinstance(value, str):
                self._check_text(value, path)
            elif isinstance(value, float) and not math.isfinite(value):
                raise self.refusal(path, f"{value} is no JSON")
            elif isinstance(value, int) and not isinstance(value, bool) and abs(value) > _EXACT:
                raise self.refusal(path, f"{value} is beyond 2**53 and cannot be followed exactly; take it as a string")
            elif value is not None and not isinstance(value, (bool, int, float)):
                raise self.refusal(path, f"{_shown(value)} is no JSON")

    def _check_text(self, text: Any, path: str) -> None:
        if not isinstance(text, str):
            raise self.refusal(path, f"the name {_shown(text)} is not a text")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise self.refusal(path, f"{text!r} holds a lone surrogate; remove it") from None

    def _properties(self, key: str, value: Any, path: str) -> dict[str, Any]:
        if not isinstance(value, Mapping):
            raise self.refusal(path, f"{_shown(value)} is not an object of schemas")
        made = {}
        for name, inner in value.items():
            self._check_text(name, path)
            here = f"{path}/{name}"
            made[self.pattern(name, here) if key == "patternProperties" else name] = self._made(inner, here)
        return made

    def _required(self, value: Any, path: str) -> list[str]:
        if not isinstance(value, (list, tuple)):
            raise self.refusal(path, f"{_shown(value)} is not a list of names")
        for name in value:
            self._check_text(name, path)
        return list(dict.fromkeys(value))

    def _items(self, key: str, value: Any, schema: Mapping[str, Any], made: dict[str, Any], path: str) -> None:
        """Lists of `items` and `additionalItems` are the older words for prefixItems and items."""
        older = isinstance(schema.get("items"), (list, tuple))
        if key == "additionalItems":
            if older:
                made["items"] = self._made(value, path)
        elif key == "prefixItems" or older:
            if not isinstance(value, (list, tuple)):
                raise self.refusal(path, f"{_shown(value)} is not a list of schemas")
            made["prefixItems"] = [self._made(part, f"{path}/{at}") for at, part in enumerate(value)]
        else:
            made["items"] = self._made(value, path)

    def pattern(self, value: Any, path: str) -> str:
        """A pattern for the whole string, in Rust's words."""
        if not isinstance(value, str):
            raise self.refusal(path, f"{_shown(value)} is not a pattern")
        try:
            return f"^(?:{found(value)})$"
        except ArgumentError as error:
            raise self.refusal(path, str(error)) from None

    def _format(self, value: Any, types: list[str] | None, made: dict[str, Any], path: str) -> list[str]:
        if value in NUMBERS and types is not None and not {"integer", "number"}.isdisjoint(types):
            limit = NUMBERS[value]
            if limit is not None:
                made["minimum"] = max(made.get("minimum", -limit), -limit, -_LARGEST)
                made["maximum"] = min(made.get("maximum", limit - 1), limit - 1, _LARGEST)
            return []
        if value in UNCHECKED or (types is not None and "string" not in types):
            return []
        if not isinstance(value, str) or value not in FORMATS:
            known = ", ".join(sorted(FORMATS))
            raise self.refusal(path, f"the format {_shown(value)} is not known (known are {known}); leave it out")
        return [self.pattern(f"^(?:{FORMATS[value]})$", path)]

    def _add_patterns(self, made: dict[str, Any], patterns: Sequence[str]) -> None:
        if patterns:
            made["pattern"] = patterns[0]
        for further in patterns[1:]:
            made.setdefault("allOf", []).append({"pattern": further})

    def _check_properties(self, made: Mapping[str, Any], path: str) -> None:
        """Names that are not given beforehand may come twice: they count once."""
        least = made.get("minProperties", 0)
        free = made.get("additionalProperties", True) is not False or bool(made.get("patternProperties"))
        if least > len(made.get("required", ())) and free:
            raise self.refusal(
                path, "'minProperties' is not supported where names are free; require names, or forbid additional ones"
            )

    def _tells_apart(self, parts: Sequence[Any]) -> bool:
        """Whether each part is a list of values, and none is in two."""
        values: list[Any] = []
        for part in parts:
            if not isinstance(part, dict) or not part.keys() <= {"const", "enum", "type"} or not part.keys() - {"type"}:
                return False
            values += [part["const"]] if "const" in part else part["enum"]
        texts = [str(value) for value in values]
        return all(isinstance(value, (str, int)) for value in values) and len(set(texts)) == len(texts)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
