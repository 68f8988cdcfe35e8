"""GPTQ and AutoRound checkpoints, whose integers are those of MLX's affine quantization in another order.

Knows quantization_config of quant_method "gptq" and "auto-round", the four tensors of a GPTQ module, and what has to
agree in them. What they are in MLX's terms is integers.py's.

    X.qweight  I32 [in * bits / 32, out]           -> weight  U32 [out, in * bits / 32]: the same words, transposed
    X.scales   F16 or BF16 [in / group, out]       -> scales  [out, in / group]
    X.qzeros   I32 [in / group, out * bits / 32]   -> biases  [out, in / group] = -zero * scale
    X.g_idx    I32 [in], the group of each column; it may be left out where groups are neighbours

Where groups are of scattered columns (desc_act), which MLX does not have, the values are dequantized in float32.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms import awq, integers
from mlx_qwen35.checkpoint.forms.awq import Awq
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, Taken, named_dtype
from mlx_qwen35.checkpoint.forms.integers import Integers, Lines, unpacked
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError

_AUTOROUND = ("auto-round", "auto_round", "autoround")
METHODS = ("gptq", *_AUTOROUND)
# AutoRound's packings, and how far each stores zeros below themselves.
_PACKINGS = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_gptq": 1, "gptq": 1}
_AWQ = ("auto_round:auto_awq", "auto_round:awq", "auto_awq", "awq")
_MOST_REPEATS, _LONGEST_RULE = 4, 200  # of a pattern for modules' paths
KINDS = ("qweight", "scales", "qzeros", "g_idx")
_BITS = (2, 3, 4, 8)  # those whose streams are MLX's too
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Grid:
    """Of a module: bits; group, None: all of a row; symmetric: whether its zeros all are the middle one."""

    bits: int
    group: int | None
    symmetric: bool


@dataclass(frozen=True)
class Gptq:
    """What config.json says. grid: of most modules. lower: how far the files store each zero below itself.

    The older format ("gptq") stores zero - 1, the newer ("gptq_v2") the zero. scattered: whether groups are not of
    neighbours. dtype: of the model that was quantized. modules, rules: what is said of single modules, by published
    path or by a pattern for it; None: they are left unquantized.
    """

    grid: Grid
    lower: int
    scattered: bool = False
    dtype: str = "BF16"
    modules: Mapping[str, Grid | None] = field(default_factory=dict, hash=False)
    rules: tuple[tuple[re.Pattern[str], Grid | None], ...] = ()
    name: ClassVar[str] = "GPTQ"
    endings: ClassVar[tuple[str, ...]] = tuple(f".{kind}" for kind in KINDS)
    streams: ClassVar[bool] = False
    unused: ClassVar[tuple[str, ...]] = ()

    @property
    def spec(self) -> QuantSpec | None:
        """What most modules have in MLX's terms; None: they are dequantized."""
        group = self.grid.group or GROUP_SIZES["affine"][-1]
        return None if self.scattered else QuantSpec(self.grid.bits, group, "affine")

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """The integers of a linear map of the text model or the MTP layer, as MLX packs them."""
        stems = () if ours.startswith("vision.") or not is_linear(ours, shape) else found.stems(ours)
        taken = Taken(found.entries, stems)
        return self._made(ours, shape, taken) if taken.has("qweight") else None

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: GPTQ is read in linear maps of the text model only, and has no part of its own"

    def of(self, path: str) -> Grid | None:
        """The grid of one published module; None where it is left unquantized."""
        rest = next((grid for rule, grid in self.rules if rule.fullmatch(path)), self.grid)
        return self.modules.get(path, rest)

    def _made(self, ours: str, shape: Shape, taken: Taken) -> Made | list[str]:
        names = taken.stems
        *_, height, width = shape
        own = {self.of(name) for name in names}
        if len(own) > 1:
            return [f"{names[0]} and the other experts have different quantizations by config.json, which is not read"]
        grid = own.pop()
        if grid is None:
            return [f"{names[0]}.qweight is there, but config.json says that the module is not quantized"]
        bits, group = grid.bits, grid.group or width
        if width % group or height * bits % 32 or width * bits % 32:
            return [
                f"{names[0]}.qweight is of a [{height}, {width}] map, which groups of {group} and words of 32 bits do "
                f"not divide. {LEAST[0].upper()}{LEAST[1:]}"
            ]
        groups = width // group
        qweight = taken.take("qweight", ("I32",), (width * bits // 32, height))
        scales = taken.take("scales", _SCALES, (groups, height))
        zeros = taken.take("qzeros", ("I32",), (groups, height * bits // 32))
        order = taken.take("g_idx", ("I32",), (width,)) if taken.has("g_idx") or self.scattered else ()
        if taken.problems:
            return taken.problems
        of = Integers(integers.gptq(bits, self.lower), shape, qweight, scales, dtype=self.dtype, middle=1 << bits - 1)
        if self.scattered:
            return replace(of, zeros=zeros, order=order).made(ours)
        checked = zeros if grid.symmetric else ()
        of = of if grid.symmetric else replace(of, zeros=zeros)
        biases = f"{ours.removesuffix('.weight')}.biases"
        made, part = of.made(ours), _Checked(biases, of, True, checked, order, self.lower)
        return replace(made, parts={**made.parts, biases: part}) if made.spec else made


@dataclass(frozen=True)
class _Checked(Lines):
    """The biases of groups in order, whose tensors are held against config.json as they are read.

    found: qzeros, where all of them should be the middle one; along: g_idx, if there is any; lower: as in Gptq.
    """

    found: tuple[Entry, ...]
    along: tuple[Entry, ...]
    lower: int

    @property
    def entries(self) -> tuple[Entry, ...]:
        return super().entries + self.found + self.along

    @property
    def nbytes(self) -> int:
        return sum(entry.nbytes for entry in self.of.zeros + self.found + self.along)

    def fetch(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """Raises CheckpointError where a zero is not that of a symmetric quantization, or columns are out of order."""
        here = self._slice(start, stop) if self.stacked else slice(None)
        for entry in self.found[here]:
            self._check_zeros(entry)
        for entry in self.along[here]:
            self._check_order(entry)
        return super().fetch(start, stop)

    def _check_zeros(self, entry: Entry) -> None:
        words, bits, middle = files.read(entry), self.of.packing.bits, self.of.middle
        stored = middle - self.lower
        wrong = np.argwhere(unpacked(words.view(np.uint32), bits) != stored)
        if len(wrong):
            row, column = (int(place) for place in wrong[0])
            word = f"0x{int(words[row, column * bits // 32]) & 0xFFFFFFFF:08X}"
            due = "".join(f"{stored:0{bits}b}" for _ in range(32 // bits))
            raise CheckpointError(
                f"{entry} holds {word} where a symmetric quantization of {bits} bits stores "
                f"{f'0x{int(due, 2):08X}' if 32 % bits == 0 else stored} "
                f"(zeros {middle}{' less 1' if self.lower else ''}): config.json's sym or "
                f"checkpoint_format does not fit these files. {LEAST[0].upper()}{LEAST[1:]}"
            )

    def _check_order(self, entry: Entry) -> None:
        columns, size = files.read(entry), self.of.shape[-1] // self.of.groups
        wrong = np.flatnonzero(columns != np.arange(len(columns)) // size)
        if len(wrong):
            raise CheckpointError(
                f"{entry} puts column {wrong[0]} into group {columns[wrong[0]]}, not {wrong[0] // size}, though "
                f"config.json does not say desc_act: restore the config.json that came with it. Or {LEAST}"
            )


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Gptq | Awq:
    """What a quantization_config of one of METHODS says; raises CheckpointError for what of it is not read.

    raw: all of config.json; where: the file, for errors.
    """
    if section.get("quant_method") in _AUTOROUND and section.get("packing_format") in _AWQ:
        return awq.read_config({key: section[key] for key in ("bits", "group_size") if key in section}, raw, where)
    grid, dtype = _read_grid(section, where, ""), named_dtype(raw)
    if section.get("quant_method") in _AUTOROUND:
        return _read_autoround(section, grid, dtype, where)
    scattered = section.get("desc_act", False)
    if not isinstance(scattered, bool):
        raise _fail(where, "desc_act", f"is {scattered!r:.40} where true or false is expected")
    form = section.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _fail(where, "checkpoint_format", f"is {form!r:.40}, and only 'gptq' and 'gptq_v2' are read")
    dynamic = section.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise _fail(where, "dynamic", "is no object of rules")
    for rule, changes in dynamic.items():
        if not rule.startswith("-:") and changes:
            raise _fail(where, "dynamic", f"gives {rule!r:.80} settings of its own, which are not read")
    # In one group a row, no column can be in another.
    return Gptq(grid, 1 if form == "gptq" else 0, scattered and grid.group is not None, dtype)


def _fail(where: str, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: quantization_config.{key} {problem}: {LEAST}")


def _read_grid(section: Mapping[str, Any], where: str, prefix: str) -> Grid:
    bits, group, symmetric = section.get("bits"), section.get("group_size"), section.get("sym")
    name = "AutoRound" if section.get("quant_method", "gptq") in _AUTOROUND else "GPTQ"
    if type(bits) is not int or bits not in _BITS:
        raise _fail(
            where, f"{prefix}bits", f"is {bits!r:.40}, and {name} is read with {', '.join(map(str, _BITS))} bits only"
        )
    sizes = GROUP_SIZES["affine"]
    if type(group) is not int or group not in (-1, *sizes):
        raise _fail(
            where, f"{prefix}group_size", f"is {group!r:.40}, and MLX has groups of {', '.join(map(str, sizes))} only"
        )
    if not isinstance(symmetric, bool):
        raise _fail(where, f"{prefix}sym", f"is {symmetric!r:.40} where true or false is expected")
    return Grid(bits, None if group == -1 else group, symmetric)


def _read_autoround(section: Mapping[str, Any], grid: Grid, dtype: str, where: str) -> Gptq:
    """AutoRound's own keys: how words are packed, and what single modules have."""
    form = section.get("packing_format", "auto_round:auto_gptq")
    if not isinstance(form, str) or form not in _PACKINGS:
        raise _fail(where, "packing_format", f"is {form!r:.40}, and only {' and '.join(list(_PACKINGS)[:2])} are read")
    if section.get("data_type", "int") != "int":
        raise _fail(where, "data_type", f"is {section['data_type']!r:.40}, and only integers ('int') are read")
    activations = section.get("act_bits")
    if activations is not None and activations != 16 and activations != 32:
        raise _fail(where, "act_bits", f"is {activations!r:.40}, and quantized activations are not computed")
    extra = section.get("extra_config") or {}
    if not isinstance(extra, Mapping):
        raise _fail(where, "extra_config", "is no object of modules")
    modules: dict[str, Grid | None] = {}
    for path, changes in extra.items():
        if not isinstance(changes, Mapping):
            raise _fail(where, "extra_config", f"has no object of settings for {path!r:.80}")
        bits = changes.get("bits", grid.bits)
        if (isinstance(bits, int) and bits >= 16) or str(changes.get("data_type", "int")).startswith("float"):
            modules[path] = None
            continue
        if changes.get("data_type", "int") != "int":
            raise _fail(where, f"extra_config.{path}", f"has data_type {changes['data_type']!r:.40}, which is not read")
        own = {key: section.get(key) for key in ("sym", "bits", "group_size", "quant_method")}
        said = {key: value for key, value in changes.items() if value is not None}
        modules[path] = _read_grid(own | said, where, f"extra_config.{path}.")
    rules = tuple((pattern, modules.pop(path)) for path in [*modules] if (pattern := _pattern(path, where)))
    return Gptq(grid, _PACKINGS[form], False, dtype, modules, rules)


def _pattern(path: str, where: str) -> re.Pattern[str] | None:
    """A key of extra_config as a regular expression, where it is one and not a module's path.

    Raises CheckpointError for those that could take for ever: a config.json comes from anywhere.
    """
    if not set(path) & set("*+?[](){}|\\^$"):
        return None
    if len(re.findall(r"[*+{]", path)) > _MOST_REPEATS or re.search(r"\)[*+{?]", path) or len(path) > _LONGEST_RULE:
        raise _fail(where, f"extra_config.{path:.80}", "is a pattern of a kind that is not read")
    try:
        return re.compile(path)
    except re.error:
        return None
