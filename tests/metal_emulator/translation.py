"""From the Metal text that MLX generates to C++ for clang: a kernel's parameters, address spaces, what MSL forbids.

Knows text. Knows neither arrays nor compilers' options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_VECTOR = r"(?:float|half|bfloat|int|uint|short|ushort|char|uchar|long|ulong)[234]"
_THREE = (
    "dispatch_threads_per_threadgroup",
    "thread_position_in_grid",
    "thread_position_in_threadgroup",
    "threadgroup_position_in_grid",
    "threadgroups_per_grid",
    "threads_per_grid",
    "threads_per_threadgroup",
)
_ONE = (
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
    "thread_index_in_simdgroup",
    "thread_index_in_threadgroup",
)
_ATTRIBUTES = {name: f"emu_vector_of(emu_me->{name})" for name in _THREE}
_ATTRIBUTES |= {name: f"emu_me->{name}" for name in _ONE}
_ATTRIBUTES |= {"threads_per_simdgroup": "32u", "thread_execution_width": "32u"}

_SPACES = ("device", "constant", "threadgroup", "thread")
_TYPES = r"(?:float|half|bfloat16_t|bfloat|int|uint|u?int(?:8|16|32|64)_t|[A-Z]\w*)"
_BARE_POINTER = rf"(?<![\w*&])(?:const\s+)?{_TYPES}\s*[*&]\s*(?:const\s+)?[a-zA-Z_]\w*\s*(?=[=,);])"
# What the Mac's compiler rejects and clang takes.
_FORBIDDEN = [
    (r"\bdouble\b", "there is no double in MSL"),
    (r"\bstd\s*::", "there is no standard library in MSL"),
    (r"\b(?:new|delete|throw|try|catch|virtual|dynamic_cast|typeid|thread_local|goto)\b", "no such keyword in MSL"),
    (r"\b(?:printf|malloc|assert|memcpy)\s*\(", "there is no C library in MSL"),
    (r"\[[&=]?\w*\]\s*\([^)]*\)\s*(?:->\s*\w+\s*)?\{", "no lambdas before Metal 4"),
    (r"\bstatic\s+(?!const\b|constexpr\b|METAL_FUNC\b|_)\w", "no local static variables in MSL"),
]


class ForbiddenText(Exception):
    """A body has something that MSL does not have."""


def check_forbidden(text: str) -> None:
    """Raises ForbiddenText for what the Mac's compiler would not take, as far as text shows it."""
    plain = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: re.sub(r"[^\n]", " ", m.group()), text, flags=re.S)
    found = [(m, why) for pattern, why in _FORBIDDEN for m in re.finditer(pattern, plain)]
    found += [(m, f"no address space ({', '.join(_SPACES)})") for m in _bare_pointers(plain)]
    if found:
        lines = [f"line {plain[: m.start()].count(chr(10)) + 1}: {why}: {m.group().strip()!r}" for m, why in found]
        raise ForbiddenText("; ".join(lines))


def _bare_pointers(text: str) -> Iterator[re.Match[str]]:
    """Declarations of pointers and references without an address space; a product `T * x` looks almost the same."""
    for match in re.finditer(_BARE_POINTER, text):
        before = re.split(r"[;{}(),<]", text[: match.start()])[-1]
        if any(re.search(rf"\b{space}\b", before) for space in _SPACES):
            continue
        if "=" in before or re.match(r"\s*(?:return|auto)\b", before + match.group()):
            continue
        if re.search(r"\b[A-Z]\w*\s*\*\s*\w+\s*$", match.group()) and not re.search(
            r"(?:^|[(,;{}])\s*$", text[: match.start()]
        ):
            continue
        yield match


@dataclass(frozen=True)
class Translated:
    """C++ of one kernel, with `extern "C" void emu_kernel(void** buffers)`. buffers: their names, in order."""

    cpp: str
    buffers: tuple[str, ...]


def translate(name: str, text: str) -> Translated:
    """text: what MLX generates, preprocessed or with its own macros only; name: of the kernel in it."""
    parameters = _parameters(name, text)
    instance = re.search(r"decltype\(" + re.escape(name) + r"(<[^()]*>)\)", text)
    arguments, buffers = [], []
    for parameter in parameters:
        declared, attribute = parameter.split("[[")
        found = re.match(r"\s*(\w+)\s*(?:\(\s*(\d+)\s*\))?", attribute)
        assert found, parameter
        if found[1] == "buffer":
            kind = "emu_reference" if "&" in declared else "emu_pointer"
            arguments.append(f"{kind}{{buffers[{len(buffers)}]}}")
            buffers.append(declared.split()[-1])
        else:
            arguments.append(_ATTRIBUTES[found[1]])
    calls = f"{name}{instance[1] if instance else ''}({', '.join(arguments)});"
    entry = f'\nextern "C" void emu_kernel(void** buffers) {{ {calls} }}\n'
    return Translated(_as_cpp(text) + entry, tuple(buffers))


def _as_cpp(text: str) -> str:
    # The instantiation that names it for the host says nothing here.
    text = re.sub(r"template\s*\[\[\s*host_name.*?;", "", text, flags=re.S)
    text = re.sub(r"\[\[.*?\]\]", " ", text, flags=re.S)
    declaration = r"(?<=[;{}\n])(\s*)threadgroup\s+((?:(?!threadgroup|\()[\w:<> ])+?)\s+(\w+)\s*((?:\[[^;=]*?\])*)\s*;"
    text = re.sub(declaration, r"\1EMU_THREADGROUP(\2, \3, \4)", text)
    # A parameter `constant const int strides[2]` is a pointer.
    text = re.sub(r"\b((?:constant|device|threadgroup)\b[\w\s]*?)\s(\w+)\s*\[\w*\](?=\s*[,)])", r"\1 *\2", text)
    text = re.sub(rf"(?<![\w.])({_VECTOR})\s*\((?!\s*\*)", r"emu_make<\1>(", text)
    return re.sub(r"(?<![\w.])((?:metal\s*::\s*)?vec\s*<[^<>;]*>)\s*\(", r"emu_make<\1>(", text)


def headers_as_cpp(text: str) -> str:
    """The same for headers of MLX, preprocessed."""
    return _as_cpp(text)


def _parameters(name: str, text: str) -> list[str]:
    start = re.search(r"\[\[\s*kernel\s*\]\]\s*void\s+" + re.escape(name) + r"\s*\(", text)
    assert start, f"no kernel {name} in what MLX generated"
    end, depth = start.end(), 1
    while depth:
        depth += {"(": 1, ")": -1}.get(text[end], 0)
        end += 1
    parts, depth, part = [], 0, ""
    for letter in text[start.end() : end - 1]:
        depth += (letter in "(<[{") - (letter in ")>]}")
        if letter == "," and depth == 0:
            parts.append(part)
            part = ""
        else:
            part += letter
    return [part.strip() for part in [*parts, part] if part.strip()]
