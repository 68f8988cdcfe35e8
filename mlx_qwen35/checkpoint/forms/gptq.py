"""GPTQ and AutoRound checkpoints, whose integers are those of MLX's affine quantization in another order.

Knows quantization_config of quant_method "gptq" and "auto-round", the four tensors of a GPTQ module, and what they are
in MLX's terms. Knows no Model. Nothing is quantized again: value = scale * (q - zero) here, and scale * q + bias there.

    X.qweight  I32 [in * bits / 32, out]           -> weight  U32 [out, in * bits / 32]: the same words, transposed
    X.scales   F16 or BF16 [in / group, out]       -> scales  [out, in / group]
    X.qzeros   I32 [in / group, out * bits / 32]   -> biases  [out, in / group] = -zero * scale
    X.g_idx    I32 [in], the group of each column; it may be left out where groups are neighbours

Only symmetric ones are read: their zero is a power of two, so that a bias has as few digits as its scale and is exact.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.forms.face import LEAST, Made, Published, Taken
from mlx_qwen35.checkpoint.inventory import Shape, is_linear
from mlx_qwen35.checkpoint.part import DTYPES, as_array
from mlx_qwen35.config import GROUP_SIZES, QuantSpec
from mlx_qwen35.errors import CheckpointError

_AUTOROUND = ("auto-round", "auto_round", "autoround")
METHODS = ("gptq", *_AUTOROUND)
# AutoRound's packings, and how far each stores zeros below themselves.
_PACKINGS = {"auto_round:auto_gptq": 1, "auto_round:gptq": 1, "auto_gptq": 1, "gptq": 1}
_MOST_REPEATS, _LONGEST_RULE = 4, 200  # of a pattern for modules' paths
KINDS = ("qweight", "scales", "qzeros", "g_idx")
_BITS = (2, 4, 8)  # those whose values do not cross words
_SCALES = ("F16", "BF16", "F32")


@dataclass(frozen=True)
class Gptq:
    """What config.json says. spec: MLX's of the same grid; lower: how far the files store each zero below itself.

    The older format ("gptq") stores zero - 1, the newer ("gptq_v2") the zero. modules, rules: what AutoRound did with
    single modules, by published path or by a pattern for it; None: it left them unquantized.
    """

    spec: QuantSpec
    lower: int
    modules: Mapping[str, QuantSpec | None] = field(default_factory=dict, hash=False)
    rules: tuple[tuple[re.Pattern[str], QuantSpec | None], ...] = ()
    name: ClassVar[str] = "GPTQ"
    endings: ClassVar[tuple[str, ...]] = tuple(f".{kind}" for kind in KINDS)

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """The integers of a linear map of the text model or the MTP layer, as MLX packs them."""
        stems = () if ours.startswith("vision.") or not is_linear(ours, shape) else found.stems(ours)
        taken = Taken(found.entries, stems)
        return _made(ours, shape, taken, self) if taken.has("qweight") else None

    def left_over(self, entry: Entry) -> str | None:
        if not entry.name.endswith(self.endings):
            return None
        return f"{entry} is left over: GPTQ is read in linear maps of the text model only, and has no part of its own"

    def of(self, path: str) -> Gptq | None:
        """The same for one published module; None where it is left unquantized."""
        if not self.modules and not self.rules:
            return self
        rest = next((spec for rule, spec in self.rules if rule.fullmatch(path)), self.spec)
        found = self.modules.get(path, rest)
        return found and Gptq(found, self.lower)

    @property
    def zero(self) -> int:
        return 1 << self.spec.bits - 1


@dataclass(frozen=True)
class GptqPart:
    """The packed weight, the scales or the biases of one of our modules. shape: ours, [E, out, ..] where stacked.

    main: qweight or scales, one for each expert. zeros, order: qzeros and g_idx, with the biases only.
    """

    ours: str
    main: tuple[Entry, ...]
    zeros: tuple[Entry, ...]
    order: tuple[Entry, ...]
    shape: Shape
    stacked: bool
    gptq: Gptq
    computed: ClassVar[bool] = False
    growth: ClassVar[int] = 1

    @property
    def cuts(self) -> bool:
        """The rows of a module are the files' columns, all of which are read for any; experts lie apart."""
        return self.stacked

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.main + self.zeros + self.order

    @property
    def dtype(self) -> str:
        return "U32" if self.main[0].dtype == "I32" else self.main[0].dtype

    @property
    def nbytes(self) -> int:
        """Of the biases only what is theirs: the scales count as scales."""
        return sum(entry.nbytes for entry in (self.zeros + self.order or self.main))

    @property
    def rows(self) -> int:
        return self.shape[0]

    def fetch(self, start: int = 0, stop: int | None = None) -> tuple[np.ndarray, np.ndarray | None, slice]:
        """The words or scales of our rows start..stop, [.., in, out] as they lie there; the zeros; and which rows.

        g_idx is held against the groups here, for it has no rows. Raises CheckpointError if it does not follow them.
        """
        which = slice(start, self.rows if stop is None else stop)
        if not self.stacked:  # our rows are the files' columns: the whole is read
            zeros = files.read(self.zeros[0]) if self.zeros else None
            self._check_order(self.order)
            return files.read(self.main[0])[:, which], zeros, which
        zeros = files.read_stacked(self.zeros[which]) if self.zeros else None
        self._check_order(self.order[which])
        return files.read_stacked(self.main[which]), zeros, which

    def finish(self, raw: tuple[np.ndarray, np.ndarray | None, slice], dtype: mx.Dtype | None) -> mx.array:
        """What fetch() gave, as MLX has it; dtype is of scales and biases, None keeps the file's.

        Raises CheckpointError where a zero is not that of a symmetric quantization.
        """
        found, zeros, which = raw
        if zeros is not None:
            self._check_zeros(zeros, which)
        if self.dtype == "U32":
            x = mx.array(np.ascontiguousarray(found.swapaxes(-1, -2)).view(np.uint32))
        else:
            x = mx.contiguous(as_array(np.ascontiguousarray(found), self.dtype).swapaxes(-1, -2))
            if zeros is not None:
                x = -self.gptq.zero * x
            x = x.astype(dtype or DTYPES[self.dtype])
        mx.eval(x)
        return x

    def _check_order(self, order: tuple[Entry, ...]) -> None:
        for entry in order:
            groups = files.read(entry)
            size = self.gptq.spec.group_size
            wrong = np.flatnonzero(groups != np.arange(len(groups)) // size)
            if len(wrong):
                raise CheckpointError(
                    f"{entry} puts column {wrong[0]} into group {groups[wrong[0]]}, not {wrong[0] // size}: groups of "
                    f"scattered columns (desc_act) are not read. {LEAST[0].upper()}{LEAST[1:]}"
                )

    def _check_zeros(self, zeros: np.ndarray, which: slice) -> None:
        bits, stored = self.gptq.spec.bits, self.gptq.zero - self.gptq.lower
        word = np.uint32(sum(stored << place for place in range(0, 32, bits)))
        wrong = np.argwhere(zeros.view(np.uint32) != word)
        if len(wrong):
            entry = self.zeros[which.start + int(wrong[0][0]) if self.stacked else 0]
            found = int(zeros[tuple(wrong[0])]) & 0xFFFFFFFF
            raise CheckpointError(
                f"{entry} holds 0x{found:08X} where a symmetric quantization of {bits} bits stores 0x{word:08X} "
                f"(zeros {self.gptq.zero}{' less 1' if self.gptq.lower else ''}): config.json's sym or "
                f"checkpoint_format does not fit these files. {LEAST[0].upper()}{LEAST[1:]}"
            )


def read_config(section: Mapping[str, Any], raw: Mapping[str, Any], where: str) -> Gptq:
    """What a quantization_config of one of METHODS says; raises CheckpointError for what MLX's grid cannot hold.

    where: the file, for errors.
    """
    spec = _read_spec(section, where, "")
    if section.get("quant_method") in _AUTOROUND:
        return _read_autoround(section, spec, where)
    if section.get("desc_act", False) is not False:
        raise _fail(where, "desc_act", f"is {section['desc_act']!r:.40}, and groups of scattered columns are not read")
    form = section.get("checkpoint_format", "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise _fail(where, "checkpoint_format", f"is {form!r:.40}, and only 'gptq' and 'gptq_v2' are read")
    dynamic = section.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise _fail(where, "dynamic", "is no object of rules")
    for rule, changes in dynamic.items():
        if not rule.startswith("-:") and changes:
            raise _fail(where, "dynamic", f"gives {rule!r:.80} settings of its own, which are not read")
    return Gptq(spec, 1 if form == "gptq" else 0)


def _fail(where: str, key: str, problem: str) -> CheckpointError:
    return CheckpointError(f"{where}: quantization_config.{key} {problem}: {LEAST}")


def _read_spec(section: Mapping[str, Any], where: str, prefix: str) -> QuantSpec:
    bits, group_size, tool = section.get("bits"), section.get("group_size"), section.get("quant_method", "gptq")
    name = "AutoRound" if tool in _AUTOROUND else "GPTQ"
    if type(bits) is not int or bits not in _BITS:
        raise _fail(
            where, f"{prefix}bits", f"is {bits!r:.40}, and {name} is read with {', '.join(map(str, _BITS))} bits only"
        )
    sizes = GROUP_SIZES["affine"]
    if type(group_size) is not int or group_size not in sizes:
        raise _fail(
            where,
            f"{prefix}group_size",
            f"is {group_size!r:.40}, and MLX has groups of {', '.join(map(str, sizes))} only",
        )
    if section.get("sym") is not True:
        raise _fail(
            where,
            f"{prefix}sym",
            f"is {section.get('sym')!r:.40}, and only symmetric {name} (true) becomes MLX's without loss",
        )
    return QuantSpec(bits, group_size, "affine")


def _read_autoround(section: Mapping[str, Any], spec: QuantSpec, where: str) -> Gptq:
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
    modules: dict[str, QuantSpec | None] = {}
    for path, changes in extra.items():
        if not isinstance(changes, Mapping):
            raise _fail(where, "extra_config", f"has no object of settings for {path!r:.80}")
        bits = changes.get("bits", spec.bits)
        if (isinstance(bits, int) and bits >= 16) or str(changes.get("data_type", "int")).startswith("float"):
            modules[path] = None
            continue
        if changes.get("data_type", "int") != "int":
            raise _fail(where, f"extra_config.{path}", f"has data_type {changes['data_type']!r:.40}, which is not read")
        own = {"sym": True, "bits": spec.bits, "group_size": spec.group_size, "quant_method": "auto-round"}
        said = {key: value for key, value in changes.items() if value is not None}
        modules[path] = _read_spec(own | said, where, f"extra_config.{path}.")
    rules = tuple((pattern, modules.pop(path)) for path in [*modules] if (pattern := _pattern(path, where)))
    return Gptq(spec, _PACKINGS[form], modules, rules)


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


def _made(ours: str, shape: Shape, taken: Taken, gptq: Gptq) -> Made | list[str]:
    """The parts of one of our weights of unquantized `shape`, or what is wrong with the files' tensors, in words."""
    names = taken.stems
    *_, height, width = shape
    own = {gptq.of(name) for name in names}
    if len(own) > 1:
        return [f"{names[0]} and the other experts have different quantizations by config.json, which is not read"]
    if None in own:
        return [f"{names[0]}.qweight is there, but config.json says that the module is not quantized"]
    gptq = own.pop()
    bits, group = gptq.spec.bits, gptq.spec.group_size
    stacked = len(shape) == 3
    if width % group or height * bits % 32:
        return [
            f"{names[0]}.qweight is of a [{height}, {width}] map, which groups of {group} and words of {32 // bits} "
            f"values do not divide. {LEAST[0].upper()}{LEAST[1:]}"
        ]
    packed, groups = width * bits // 32, width // group
    qweight = taken.take("qweight", ("I32",), (packed, height))
    scales = taken.take("scales", _SCALES, (groups, height))
    zeros = taken.take("qzeros", ("I32",), (groups, height * bits // 32))
    order = taken.take("g_idx", ("I32",), (width,)) if taken.has("g_idx") else ()
    if taken.problems:
        return taken.problems
    outer = shape[:-1]
    module = ours.removesuffix(".weight")
    parts = (
        GptqPart(f"{module}.weight", qweight, (), (), (*outer, packed), stacked, gptq),
        GptqPart(f"{module}.scales", scales, (), (), (*outer, groups), stacked, gptq),
        GptqPart(f"{module}.biases", scales, zeros, order, (*outer, groups), stacked, gptq),
    )
    return Made({part.ours: part for part in parts}, gptq.spec)
