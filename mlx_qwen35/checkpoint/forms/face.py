"""The face of a published form: what a reader of another tool's quantization is asked, and what it answers.

Knows neither tools nor tensors. A form is made of what config.json says (table.py), and then asked for every tensor of
the model, one after the other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mlx_qwen35.checkpoint.files import Entry
from mlx_qwen35.checkpoint.inventory import Shape
from mlx_qwen35.checkpoint.names import Layout
from mlx_qwen35.checkpoint.part import AnyPart
from mlx_qwen35.config import QuantSpec

_NAMED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
LEAST = "take the unquantized checkpoint of the same model, or an MLX conversion of it"


@dataclass(frozen=True)
class Published:
    """The tensors of a checkpoint, by their names. experts: how many the configuration calls for."""

    entries: Mapping[str, Entry]
    layout: Layout
    experts: int = 0

    def stems(self, ours: str) -> tuple[str, ...]:
        """The published modules that hold one of our weights: one, or one for each expert, in order.

        () for experts that lie in one tensor.
        """
        # A damaged count of experts must not grow a list of names that no file could hold.
        origin = self.layout.source(ours, min(self.experts, len(self.entries) + 1))
        if ".experts." in ours and not origin.stacked:
            return ()
        return tuple(name.removesuffix(".weight") for name in origin.names)


@dataclass(frozen=True)
class Made:
    """What holds one of our tensors. parts: by our names.

    spec: they are weight, scales and, where affine, biases as MLX packs them, with this quantization; None: the one
    part gives floats.
    """

    parts: Mapping[str, AnyPart]
    spec: QuantSpec | None = None


class Form(Protocol):
    """How another tool quantized a checkpoint, by its config.json.

    name: as people call it. endings: what its tensors' names have in place of ".weight", or behind the whole name.
    unused: endings of tensors that say nothing of weights, such as scales of activations; nobody reads them. spec: what
    most of its modules are in MLX's terms; None: floats. streams: whether experts are read from where they lie, as far
    as that can be told before the files are there.
    """

    @property
    def name(self) -> str: ...
    @property
    def endings(self) -> tuple[str, ...]: ...
    @property
    def unused(self) -> tuple[str, ...]: ...
    @property
    def spec(self) -> QuantSpec | None: ...
    @property
    def streams(self) -> bool: ...

    def make(self, ours: str, shape: Shape, found: Published) -> Made | list[str] | None:
        """How one of our tensors of unquantized `shape` is made. None: it is not of this form, but plain.

        A list: what is wrong with its published tensors, in words.
        """

    def left_over(self, entry: Entry) -> str | None:
        """Why a tensor is one of this form that no part has, in words; None: it is none of this form's."""


@dataclass
class Taken:
    """Published tensors of one of our weights, as they are looked up: one of each kind for each of its modules.

    problems: what was wrong with them, one for a kind, in words.
    """

    entries: Mapping[str, Entry]
    stems: tuple[str, ...]
    problems: list[str] = field(default_factory=list)

    def take(self, kind: str, dtypes: tuple[str, ...], *shapes: Shape) -> tuple[Entry, ...]:
        """The tensors STEM.kind, all of one of these dtypes and of the first's shape, which is one of these."""
        found: list[Entry] = []
        for stem in self.stems:
            name = f"{stem}.{kind}"
            entry = self.entries.get(name)
            due = (found[0].shape,) if found else shapes
            problem = None
            if entry is None:
                problem = f"{name} is in none of the files (expected {'/'.join(dtypes)} {list(shapes[0])})"
            elif entry.dtype not in dtypes or (found and entry.dtype != found[0].dtype):
                wanted = "/".join(dtypes) if entry.dtype not in dtypes else f"{found[0].dtype} as its neighbours"
                problem = f"{entry} has dtype {entry.dtype}, expected {wanted}"
            elif entry.shape not in due:
                wanted = " or ".join(str(list(shape)) for shape in due)
                problem = f"{entry} has shape {list(entry.shape)}, expected {wanted} by config.json"
            if problem:
                self.problems.append(problem)
                break
            found.append(entry)
        return tuple(found)

    def alike(self, kind: str, dtypes: tuple[str, ...], most: int | None = None) -> tuple[Entry, ...]:
        """The same for tensors of one axis, of any length up to `most`, which may differ."""
        found: list[Entry] = []
        for stem in self.stems:
            entry = self.entries.get(f"{stem}.{kind}")
            listed = entry is not None and entry.dtype in dtypes and len(entry.shape) == 1
            if not listed or (most and entry.nbytes > most):
                self.problems.append(f"{stem}.{kind} is not there, or no list of {'/'.join(dtypes)}")
                break
            found.append(entry)
        return tuple(found)

    def dtype(self, kind: str) -> str | None:
        """Of the first module's tensor of this kind; None where it has none."""
        entry = self.entries.get(f"{self.stems[0]}.{kind}") if self.stems else None
        return entry.dtype if entry else None

    def has(self, kind: str) -> bool:
        """Whether any of the modules has a tensor of this kind."""
        return any(f"{stem}.{kind}" in self.entries for stem in self.stems)


def named_dtype(raw: Mapping[str, Any]) -> str:
    """The dtype that a config.json names, as safetensors calls it."""
    text = raw.get("text_config")
    holders = (text if isinstance(text, Mapping) else {}, raw)
    named = (holder.get(key) for holder in holders for key in ("dtype", "torch_dtype"))
    return next((_NAMED[name] for name in named if isinstance(name, str) and name in _NAMED), "BF16")
