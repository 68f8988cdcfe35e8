"""What is wrong with published tensors that are to be one of ours: missing, or of another shape or dtype.

Knows how to say it. Knows neither files nor which tensors a model has.
"""

from __future__ import annotations

from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.names import HF, Layout
from mlx_qwen35.checkpoint.part import Part
from mlx_qwen35.config import QuantSpec


def missing(name: str, ours: str, shape: Shape, dtypes: tuple[str, ...], layout: Layout) -> str:
    """In words, that a published tensor is not there. shape, dtypes: of ours."""
    hint = ""
    if ours == "lm_head.weight":
        hint = "; if the model uses its embeddings as the head, set tie_word_embeddings to true in config.json"
    if ".experts." in ours and layout.kind == HF and name.endswith(".weight"):
        hint = "; experts of other numbers are there, see num_experts"
    return f"{name} is in none of the files (expected {'/'.join(dtypes)} {_published(ours, shape, layout)}){hint}"


def _published(ours: str, shape: Shape, layout: Layout) -> list[int]:
    """Our shape as the published tensor would have it."""
    origin = layout.source(ours, 1)
    axes = layout.axes(ours)
    if axes:
        shape = tuple(shape[axes.index(axis)] for axis in range(len(axes)))
    if origin.half is not None:
        shape = (shape[0], 2 * shape[1], *shape[2:])
    return list(shape[1:] if origin.stacked else shape)


def misfit(part: Part, shape: Shape, dtypes: tuple[str, ...], spec: QuantSpec | None = None) -> str | None:
    """What is wrong with the shape or dtype of a part's published tensors; None if nothing is."""
    first = part.entries[0]
    for entry in part.entries:
        if entry.dtype not in dtypes or entry.dtype != first.dtype:
            wanted = "/".join(dtypes) if entry.dtype not in dtypes else f"{first.dtype} as its neighbours"
            hint = ""
            if entry.dtype.startswith("F8") and "F8_E4M3" not in dtypes:
                hint = ": FP8 is read in linear maps only, and where config.json's quantization_config says so"
            return f"{entry} has dtype {entry.dtype}, expected {wanted}{hint}"
        if entry.shape != first.shape:
            return f"{entry} has shape {list(entry.shape)}, its neighbours have {list(first.shape)}"
    odd = part.half is not None and (len(first.shape) < 2 or first.shape[1] % 2)
    if part.shape == shape and not odd:
        return None
    if part.stacked and part.shape[0] != shape[0] and part.shape[1:] == shape[1:]:
        return f"{first} and its neighbours are {part.shape[0]} experts, config.json says {shape[0]}"
    expected = list(shape[1:] if part.stacked else shape)
    if part.half is not None:
        expected[1] *= 2
    if part.axes:
        expected = [shape[part.axes.index(axis)] for axis in range(len(shape))]
    how = f" ({spec.bits} bits, group_size {spec.group_size}, {spec.mode} by config.json)" if spec else ""
    return f"{first} has shape {list(first.shape)}, expected {expected}{how}"
