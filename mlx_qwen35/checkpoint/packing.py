"""How each module of an MLX checkpoint is packed: what config.json says, held against the shapes of its tensors.

Knows how entries of config.json spell modules, and what shapes leave open: nothing, where a module's width is known.
Knows neither files nor which modules a model has.

An entry for a module is believed, and the shapes have to agree. What has none, or one that leaves something out, is as
the shapes tell: they alone know where a writer gave single modules other bits and kept that to himself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import mlx.core as mx

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.names import bare
from mlx_qwen35.checkpoint.part import FLOATS
from mlx_qwen35.config import GROUP_SIZES, READ_BITS, ModelConfig, Quantization, QuantSpec
from mlx_qwen35.errors import CheckpointError

ONE_BIT = (0, 32, 4)  # the first version of MLX that computes with one bit
_NUMBERED = re.compile(r"\.experts\.\d+\.")
_BOTH = re.compile(r"(.*\.experts)\.gate_up_proj")


class Told:
    """What config.json says of single modules, by our names for them, however it spells their paths."""

    def __init__(self, quantization: Quantization | None, prefix: str = "", rest: Told | None = None):
        """prefix: of our names for the modules that this is of, which its paths may leave out; rest: what is said of
        them elsewhere, where this says nothing."""
        self._default = quantization and quantization.default
        self._rest = rest
        self._entries: dict[str, dict[str, tuple[QuantSpec | None, tuple[str, ...]]]] = {}
        for path, spec in (quantization.overrides if quantization else {}).items():
            module = _NUMBERED.sub(".experts.", bare(path))
            module = module if module.startswith(prefix) else prefix + module
            both = _BOTH.fullmatch(module)
            for name in (f"{both[1]}.gate_proj", f"{both[1]}.up_proj") if both else (module,):
                self._entries.setdefault(name, {})[path] = spec, quantization.unsaid.get(path, ())

    def default(self, module: str) -> QuantSpec | None:
        """What a module without an entry has by config.json; None where that knows of no quantization."""
        return self._default or (self._rest and self._rest.default(module))

    def entry(self, module: str) -> tuple[QuantSpec | None, tuple[str, ...]] | None:
        """(the quantization of one of our modules, None: it has none; what of it is not said); None: no entry.

        Raises ValueError, in words, where two spellings of the same module say different things.
        """
        found = self._entries.get(module, {})
        if len(set(found.values())) > 1:
            paths = sorted(found, key=lambda path: str(found[path]))
            raise ValueError(
                f"config.json says {_words(found[paths[0]][0])} of {paths[0]} and {_words(found[paths[-1]][0])} of "
                f"{paths[-1]}, which are the same module"
            )
        return next(iter(found.values()), self._rest.entry(module) if self._rest else None)

    def spec(self, module: str) -> QuantSpec | None:
        """The quantization of one of our modules by config.json alone; None: it has none."""
        entry = self.entry(module)
        return self.default(module) if entry is None else entry[0]

    def packed_as(self, module: str, path: str, width: int, weight: Entry, scales: Entry) -> QuantSpec:
        """How a module is quantized whose scales are there; width: of its unquantized rows.

        weight, scales: its tensors, of one expert where each has its own. Raises ValueError, in words, where
        config.json knows of no quantization or contradicts itself or what is there. (A head may lie beside a model that
        is not quantized; then its shapes alone speak of it.)
        """
        entry = self.entry(module)
        if entry is not None and entry[0] is None:
            raise ValueError(f"{scales} is there, but config.json's quantization says that {path} is not quantized")
        default, seen = self.default(module), from_shapes(width, weight, scales)
        if default is None and (seen is None or not module.startswith("mtp.")):
            raise ValueError(f"{scales} is there, but config.json's quantization does not say how {path} is quantized")
        if entry is None:
            return seen or default
        said, left_out = entry
        if seen and left_out and all(getattr(seen, k) == getattr(said, k) for k in _KINDS if k not in left_out):
            return seen
        return said


_KINDS = ("bits", "group_size", "mode")


def spec_of(config: ModelConfig, path: str) -> QuantSpec | None:
    """How config.json says that the module at `path` (in any layout's spelling) is quantized."""
    return Told(config.quantization).spec(_NUMBERED.sub(".experts.", bare(path)))


def from_shapes(width: int, weight: Entry, scales: Entry) -> QuantSpec | None:
    """The one quantization of MLX that packs rows of `width` into these tensors; None where none does, or several."""
    bits, groups = weight.shape[-1:], scales.shape[-1:]
    if weight.dtype != "U32" or not (bits and groups and groups[0]) or bits[0] * 32 % width or width % groups[0]:
        return None
    found, group = bits[0] * 32 // width, width // groups[0]
    modes = [mode for mode in READ_BITS if (mode == "affine") == (scales.dtype in FLOATS)]
    fitting = [mode for mode in modes if found in READ_BITS[mode] and group in GROUP_SIZES[mode]]
    return QuantSpec(found, group, fitting[0]) if len(fitting) == 1 else None


def check_version(specs: Iterable[QuantSpec], where: str) -> None:
    """Raises CheckpointError where this MLX is too old to compute with one of these quantizations."""
    version = tuple(int(part) for part in re.findall(r"\d+", mx.__version__)[:3])
    if version < ONE_BIT and any(spec.bits == 1 for spec in specs):
        raise CheckpointError(
            f"{where} has weights of 1 bit, which MLX computes with from {'.'.join(map(str, ONE_BIT))} on; this "
            f"is MLX {mx.__version__}: pip install -U mlx, or take a conversion with more bits"
        )


def _words(spec: QuantSpec | None) -> str:
    return f"{spec.bits} bits in groups of {spec.group_size} ({spec.mode})" if spec else "no quantization"
