"""What config.json says of quantization: MLX's, with entries for single modules, or that another tool did it.

Knows MLX's modes and the spelling of config.json. Knows neither which modules a model has nor how they are packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from .fields import Fields, kind_of

GROUP_SIZES = {"affine": (32, 64, 128), "mxfp4": (32,), "mxfp8": (32,), "nvfp4": (16,)}
USUAL = {"affine": (4, 64), "mxfp4": (4, 32), "mxfp8": (8, 32), "nvfp4": (4, 16)}  # bits, group size
BITS = {"affine": (2, 3, 4, 5, 6, 8), "mxfp4": (4,), "mxfp8": (8,), "nvfp4": (4,)}

READ_BITS = BITS | {"affine": (1, *BITS["affine"])}  # with one bit a model has to be trained: it is read, not made
_OWN = ("bits", "group_size", "mode", "quant_method")


@dataclass(frozen=True)
class QuantSpec:
    """How one module is quantized, in mx.quantize's terms."""

    bits: int
    group_size: int
    mode: str


@dataclass(frozen=True)
class Quantization:
    """MLX quantization of a checkpoint: `overrides` by module path as the file writes it, None = left unquantized.

    unsaid: path -> those of "bits" and "group_size" that its entry leaves out, in whose place `overrides` has a guess.
    """

    default: QuantSpec
    overrides: Mapping[str, QuantSpec | None]
    unsaid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def read_quantization(top: Fields, text: Fields) -> tuple[Quantization | None, dict[str, Any] | None]:
    """MLX's quantization, or the quantization_config of another tool, or neither."""
    for reader in (top, text):
        section = reader.section("quantization")
        if section is not None:
            return read_section(section), None
    for reader in (top, text):
        section = reader.section("quantization_config")
        if section is not None:
            if section.has("quant_method"):
                return None, dict(section.values)
            return read_section(section), None
    return None, None


def read_section(section: Fields) -> Quantization:
    """One section of MLX's; raises CheckpointError for what MLX does not have."""
    default = _quant_spec(section)
    overrides: dict[str, QuantSpec | None] = {}
    unsaid: dict[str, tuple[str, ...]] = {}
    for path, value in section.values.items():
        if path in _OWN:
            continue
        if isinstance(value, bool):
            overrides[path] = default if value else None
        elif isinstance(value, Mapping) and any(key in value for key in _OWN):
            entry = Fields(value, section.where, f"{section.prefix}{path}.")
            left_out = tuple(key for key in ("bits", "group_size") if key not in value)
            if left_out and not _is_module(path):
                continue  # a writer's notes, not a module
            if left_out:
                usual = _usual(entry, default)
                entry = Fields({**{key: usual[key] for key in left_out}, **value}, entry.where, entry.prefix)
                unsaid[path] = left_out
            overrides[path] = _quant_spec(entry)
        elif _is_module(path) and not isinstance(value, (Mapping, str)):
            raise section.fail(path, f"is {kind_of(value)} where true, false or an object of bits is expected")
        # What is left are words of whoever wrote the file: how it was calibrated, a version, a recipe's name.
    return Quantization(default, MappingProxyType(overrides), MappingProxyType(unsaid))


def _is_module(path: str) -> bool:
    return "." in path or path in ("lm_head", "embed_tokens")


def _usual(entry: Fields, default: QuantSpec) -> dict[str, int]:
    """What stands in for what an entry leaves out, until shapes tell it."""
    mode = entry.values.get("mode") or "affine"
    if mode == default.mode:
        return {"bits": default.bits, "group_size": default.group_size}
    usual = USUAL[mode] if isinstance(mode, str) and mode in USUAL else USUAL["affine"]
    return dict(zip(("bits", "group_size"), usual, strict=True))


def _quant_spec(spec: Fields) -> QuantSpec:
    # An override that leaves out its mode is affine whatever the default's mode: this is how MLX reads it.
    mode = spec.values.get("mode") or "affine"
    if not isinstance(mode, str) or mode not in BITS:
        raise spec.fail("mode", f"is {mode!r:.80}; MLX knows {', '.join(BITS)}")
    # mlx-lm's mixed recipes write null where they mean what the mode comes with.
    bits, group_size = (
        usual if key in spec.values and not spec.has(key) else spec.size(key)
        for key, usual in zip(("bits", "group_size"), USUAL[mode], strict=True)
    )
    if bits not in READ_BITS[mode] or group_size not in GROUP_SIZES[mode]:
        raise spec.fail("bits", f"{bits} with group_size {group_size} is no {mode} quantization that MLX has")
    return QuantSpec(bits, group_size, mode)
