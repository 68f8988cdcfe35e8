"""Whether a quantization suits a module: on a sample before the work begins, and on all of it once it is written.

Knows which forms come next where one does not. Knows nothing of files or of how a checkpoint is written.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence

import mlx.core as mx

from mlx_qwen35.checkpoint.inventory import Shape, text_tensors
from mlx_qwen35.checkpoint.quantize import pack
from mlx_qwen35.checkpoint.source import Source
from mlx_qwen35.config import BITS, QuantSpec
from mlx_qwen35.conversion.loss import Loss, loss
from mlx_qwen35.conversion.piece import Piece
from mlx_qwen35.conversion.recipes import fitted
from mlx_qwen35.conversion.samples import sample_rows
from mlx_qwen35.errors import CheckpointError

Assignment = dict[str, QuantSpec | None]


def suited(
    origin: Source, assignment: Assignment, dtype: mx.Dtype | None, updated: Container[str]
) -> tuple[Assignment, list[str]]:
    """-> (the assignment, with other forms for modules that theirs would spoil; a line on each of those)

    dtype: of affine scales; None is the source's. Modules that go over as they are, or that an adapter changes
    (`updated`, names of weights), are left alone.
    """
    shapes = text_tensors(origin.config)
    found, notes = dict(assignment), []
    for module, spec in assignment.items():
        name = f"{module}.weight"
        if spec is None or spec == origin.carried(module) or name in updated:
            continue
        sample = sample_rows(origin, module, shapes[name])
        if not mx.isfinite(sample).all():
            continue  # the work will say which value it is
        reason = _reason(sample, spec, dtype)
        if reason:
            others = (other for other in _others(spec, shapes[name]) if not _reason(sample, other, dtype))
            found[module] = next(others, None)
            notes.append(f"{module} is {_called(found[module])} and not {_called(spec)}: {reason}")
    return found, notes


def _reason(sample: mx.array, spec: QuantSpec, dtype: mx.Dtype | None) -> str | None:
    """Why a form does not suit, on rows [N, in]."""
    return loss(sample, pack(sample, spec, dtype=dtype), spec).excess(spec)


def _others(spec: QuantSpec, shape: Shape) -> Iterator[QuantSpec]:
    """What comes instead, the smallest first: affine scales are floats, and reach further than E4M3."""
    for bits in BITS["affine"]:
        other = fitted(QuantSpec(bits, 64, "affine"), shape)
        if other and other != spec and bits >= spec.bits:
            yield other


def _called(spec: QuantSpec | None) -> str:
    return f"{spec.mode} of {spec.bits} bits in groups of {spec.group_size}" if spec else "not quantized"


def check_losses(
    pieces: Iterable[Piece], lost: Mapping[str, Sequence[float]], say: Callable[[str], None]
) -> None:
    """Holds all that was written against what it was made of, module by module. lost: by the names of pieces, what
    quantizing them lost (the fields of a Loss); say: told where small weights were lost. Raises CheckpointError where a
    module is spoiled though its sample was not: by twice what a sample may lose."""
    losses: dict[str, Loss] = {}
    specs = {}
    for piece in pieces:
        if piece.name in lost:
            name = piece.task.name
            specs[name] = piece.task.has
            losses[name] = losses.get(name, Loss()) + Loss(*lost[piece.name])
    for name, found in losses.items():
        reason = found.excess(specs[name], 2.0)
        if reason:
            raise CheckpointError(
                f"{name} cannot be {specs[name].mode} of {specs[name].bits} bits: {reason}. Take more bits, --q-mode "
                "affine, or --dtype bfloat16 where float16 was asked for"
            )
    emptied = {name: found.emptied_share for name, found in losses.items() if found.emptied}
    if emptied:
        most = max(emptied, key=emptied.__getitem__)
        say(f"groups of small weights became zero in {len(emptied)} tensors, at most {emptied[most]:.2%} ({most})")
