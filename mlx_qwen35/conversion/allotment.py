"""Allotment: the bits of each module for a size that the whole checkpoint is to have.

Knows how large a module is in each of MLX's affine formats, how far it then is from the source, and how much that
matters for a module of its role. Reads samples only: a few experts, a few stretches of rows, one tensor at a time.
Knows nothing of how a checkpoint is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import Shape, is_linear, text_tensors
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.quantize import packed, unpack
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.config import BITS, GROUP_SIZES, QuantSpec
from mlx_qwen35.conversion.disk import PAGE
from mlx_qwen35.conversion.recipes import fitted, is_fixed, sensitivities
from mlx_qwen35.conversion.rounding import pack
from mlx_qwen35.conversion.samples import sample_rows
from mlx_qwen35.conversion.write import SHARD_BYTES, shown_size
from mlx_qwen35.errors import CheckpointError

_HEADER = 90  # bytes of a safetensors header for a tensor, besides its name, at most
_INDEX = 70  # bytes of the index for a tensor, besides its name
_OVERRIDE = 110  # bytes of config.json for a module, besides its name
_MARGIN = 1 << 13  # what is around them


@dataclass(frozen=True)
class _Choice:
    """A form that a module may have. loss: what it adds to that of the whole."""

    spec: QuantSpec | None
    nbytes: int
    loss: float


def fit(
    origin: Source,
    target_bytes: int,
    *,
    beside: int = 0,
    group_size: int = 64,
    dtype: mx.Dtype | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, QuantSpec | None]:
    """How each linear module of the text model is to be quantized so that the checkpoint has at most `target_bytes`.

    beside: the bytes of what is written besides the text model: vision and MTP tensors, copied files. group_size: of
    the smallest groups that are tried; larger ones are, too. dtype: of what is not quantized, and of scales; None is
    the source's. on_progress: called with (modules measured, modules in all).
    Router and shared_expert_gate get 8 bits; the others what is left, where a byte saves the most. None: left as it is
    in the source.
    Raises CheckpointError, with the figures, where even the smallest form is larger.
    """
    if group_size not in GROUP_SIZES["affine"]:
        raise CheckpointError(f"a target size means affine bits, which have no groups of {group_size}: give no mode")
    shapes = text_tensors(origin.config)
    modules = {n.removesuffix(".weight"): shape for n, shape in shapes.items() if is_linear(n, shape)}
    own = 0 if dtype is None else dtype.size
    plain = sum(
        math.prod(shape) * max(own, _width(origin.parts[name].dtype))  # some stay float32 whatever is asked for
        for name, shape in shapes.items()
        if not is_linear(name, shape)
    )
    fixed = beside + plain + _around(origin, shapes, target_bytes)
    forms = {module: _forms(origin, module, shape, group_size, own) for module, shape in modules.items()}
    least = fixed + sum(min(sizes.values()) for sizes in forms.values())
    if least > target_bytes:
        raise CheckpointError(
            f"{shown_size(target_bytes)} is too small for {origin.folder}: with every module in its smallest form it "
            f"has {shown_size(least)}, {shown_size(beside)} of it beside the text model. Give at least {least} bytes"
        )
    weights = sensitivities(modules)
    choices = {}
    for number, (module, shape) in enumerate(modules.items()):
        losses = _losses(origin, module, shape, [*forms[module]])
        choices[module] = [
            _Choice(spec, forms[module][spec], weights[module] * loss) for spec, loss in losses.items()
        ]
        if on_progress:
            on_progress(number + 1, len(modules))
    return {module: choice.spec for module, choice in allot(choices, target_bytes - fixed).items()}


def allot(choices: Mapping[str, list[_Choice]], room: int) -> dict[str, _Choice]:
    """For each module one of its choices, so that they fit into `room` bytes together and lose little.

    From the smallest form of each, the step that saves most loss a byte comes first: steps along the convex hull of a
    module's choices, on which each is worth less than the one before. A step that does not fit ends its module.
    """
    hulls = {module: _hull(found) for module, found in choices.items()}
    taken = {module: hull[0] for module, hull in hulls.items()}
    room -= sum(choice.nbytes for choice in taken.values())
    steps = [
        (-_slope(before, after), number, module)
        for module, hull in hulls.items()
        for number, (before, after) in enumerate(zip(hull, hull[1:], strict=False))
    ]
    ended = set()
    for _, number, module in sorted(steps):
        before, after = hulls[module][number : number + 2]
        if module in ended or after.nbytes - before.nbytes > room:
            ended.add(module)
            continue
        taken[module] = after
        room -= after.nbytes - before.nbytes
    return taken


def _hull(choices: list[_Choice]) -> list[_Choice]:
    """From the smallest on, those choices that no mixture of two others beats."""
    hull: list[_Choice] = []
    for choice in sorted(choices, key=lambda c: (c.nbytes, c.loss)):
        if hull and choice.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], choice):
            hull.pop()
        hull.append(choice)
    return hull


def _slope(small: _Choice, large: _Choice) -> float:
    return (small.loss - large.loss) / (large.nbytes - small.nbytes)


def _forms(origin: Source, module: str, shape: Shape, group_size: int, own: int) -> dict[QuantSpec | None, int]:
    """The forms that a module may have, and its bytes in each. None: as it is in the source."""
    had = origin.carried(module)
    width = own or _width((origin.parts.get(f"{module}.scales") or origin.parts[f"{module}.weight"]).dtype)
    bits = (8,) if is_fixed(module) else BITS["affine"]
    groups = (size for size in GROUP_SIZES["affine"] if size >= group_size)
    fits = (fitted(QuantSpec(*form, "affine"), shape) for form in product(bits, groups))
    specs = list(dict.fromkeys(spec for spec in fits if spec))
    if had and (had.mode == "affine" or had.bits >= bits[0]):
        # What goes over as it is loses nothing, and more bits would not bring back what it lost before.
        specs = [had, *(spec for spec in specs if spec.bits < had.bits or spec.mode != had.mode)]
    if is_fixed(module):
        specs = specs[:1]
    found: dict[QuantSpec | None, int] = {spec: _packed_bytes(shape, spec, width) for spec in specs}
    if had is None and not (is_fixed(module) and specs):
        found[None] = math.prod(shape) * width
    return found


def _losses(
    origin: Source, module: str, shape: Shape, forms: list[QuantSpec | None]
) -> dict[QuantSpec | None, float]:
    """The relative squared error of a module in each form, on a sample."""
    found = {spec: 0.0 for spec in forms if spec in (None, origin.carried(module))}
    if len(found) < len(forms):
        sample = sample_rows(origin, module, shape)
        meant = sample.astype(mx.float32)
        norm = mx.square(meant).sum().item() or 1.0
        for spec in forms:
            if spec not in found:
                made = unpack(pack(sample, spec, search=True), spec)
                found[spec] = mx.square(made - meant).sum().item() / norm
    return found


def _width(dtype: str) -> int:
    """Bytes of a float in the target, where it had this dtype in the source."""
    return 4 if dtype == "F32" else 2


def _packed_bytes(shape: Shape, spec: QuantSpec, width: int) -> int:
    sizes = {"U32": 4, "U8": 1}
    return sum(math.prod(s) * sizes.get(tags[0], width) for s, tags in packed(shape, spec).values())


def _around(origin: Source, shapes: Mapping[str, Shape], target_bytes: int) -> int:
    """Bytes of headers, index and config.json, at most."""
    files = 2 + 2 * target_bytes // SHARD_BYTES  # two shards in a row are larger than the limit together; and MTP's
    total = _MARGIN + files * PAGE + len(json.dumps(origin.config.raw, indent=2))
    for name, shape in shapes.items():
        written = len(TARGET.source(name).names[0])
        tensors = 3 if is_linear(name, shape) else 1
        total += tensors * (2 * written + _HEADER + _INDEX)
        total += 2 * (written + _OVERRIDE) if is_linear(name, shape) else 0
    return total
