"""A GGUF as a checkpoint: its model, the vision tower and the MTP head beside it, its configuration and small files.

Knows in which order they are read, and what goes with what. Reads headers only.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

from mlx_qwen35.checkpoint.gguf.choosing import heads_beside, model_at, projectors_beside
from mlx_qwen35.checkpoint.gguf.container import Array, Gguf, GgufTensor, read_gguf
from mlx_qwen35.checkpoint.gguf.form import GgufForm
from mlx_qwen35.checkpoint.gguf.metadata import (
    PROJECTOR,
    architecture,
    check_projector,
    config_of,
    generation_of,
    prepared_by,
    projected,
    trunk_layers,
)
from mlx_qwen35.checkpoint.gguf.origins import PATCHES, mtp_layers, text_origins, tower_origins
from mlx_qwen35.checkpoint.gguf.types import FILE_TYPES
from mlx_qwen35.checkpoint.gguf.vocabulary import Vocabulary
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError

# How large pictures and videos may be, in pixels: no projector says it, and these are the family's own.
_PIXELS = {"preprocessor_config.json": (65_536, 16_777_216), "video_preprocessor_config.json": (4_096, 25_165_824)}
_PREPARED = {
    "preprocessor_config.json": {"image_processor_type": "Qwen2VLImageProcessorFast"},
    "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor"},
}


@dataclass(frozen=True)
class Opened:
    """A model that lies in GGUF files. projector: of its vision tower, None without one; notes: what whoever loads it
    should know, in words."""

    gguf: Gguf
    projector: Gguf | None
    notes: tuple[str, ...] = ()

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary(self.gguf)

    @cached_property
    def config(self) -> ModelConfig:
        """Raises CheckpointError for metadata that is damaged or not of this family."""
        heads = mtp_layers(self.gguf, trunk_layers(self.gguf))
        raw = config_of(self.gguf, self.vocabulary.named, self.projector, heads)
        return ModelConfig.from_dict(raw, where=str(self.gguf.path))

    @cached_property
    def form(self) -> GgufForm:
        """Raises CheckpointError for tensors that no model of this family has."""
        origins = text_origins(self.gguf, self.config)
        frames: tuple[GgufTensor, ...] = ()
        if self.projector is not None:
            origins |= tower_origins(self.projector)
            frames = tuple(self.projector.tensors[name] for name in PATCHES if name in self.projector.tensors)
            if len(frames) != len(PATCHES):
                raise CheckpointError(f"{self.projector.path} lacks {' or '.join(PATCHES)}: download the file again")
        return GgufForm(origins, frames, self._label, self.notes)

    @property
    def _label(self) -> str:
        """The recipe that the file names, or else the type that most of its bytes have."""
        told = FILE_TYPES.get(self.gguf.metadata.get("general.file_type"))
        sizes: Counter[str] = Counter()
        for tensor in self.gguf.tensors.values():
            sizes[tensor.kind.name] += tensor.nbytes
        return told or sizes.most_common(1)[0][0]

    @property
    def files(self) -> tuple[Path, ...]:
        """All of them."""
        return tuple(dict.fromkeys(tensor.file for tensor in self._tensors())) or self.gguf.files

    def _tensors(self) -> list[GgufTensor]:
        beside = [] if self.projector is None else list(self.projector.tensors.values())
        return [*self.gguf.tensors.values(), *beside]

    @property
    def tokenizer_bytes(self) -> int:
        """About what tokenizer.json will have: each token there takes its text and as much again."""
        arrays = (self.gguf.metadata.get(f"tokenizer.ggml.{key}") for key in ("tokens", "merges"))
        return 2 * sum(len(array.data) for array in arrays if isinstance(array, Array))

    def companions(self) -> dict[str, bytes]:
        """The small files that a folder of this model would have, made from the metadata."""
        words = self.vocabulary
        made = {
            "tokenizer.json": words.tokenizer_json(),
            "tokenizer_config.json": _json(words.tokenizer_config()),
            "generation_config.json": _json(generation_of(self.gguf, words.named)),
        }
        template = words.template()
        if template is not None:
            made["chat_template.jinja"] = template.encode()
        if self.projector is not None:
            prepared = prepared_by(self.projector)
            for name, (least, most) in _PIXELS.items():
                size = {"shortest_edge": least, "longest_edge": most}
                made[name] = _json({"size": size, **prepared, "processor_class": "Qwen3VLProcessor", **_PREPARED[name]})
        return made


def _json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def open_model(path: Path) -> Opened:
    """The model at a path: a GGUF file, one of several, or a folder with one model; raises CheckpointError.

    The vision tower is that of a projector (mmproj) beside it, whose width fits; of several the one in bfloat16, or the
    next best.
    """
    model = model_at(Path(path))
    gguf = _read(model)
    if architecture(gguf) == PROJECTOR:
        raise CheckpointError(f"{model} is a vision tower by itself (mmproj): give the file of its model, beside it")
    return Opened(_with_head(gguf), *_projector(gguf))


def _read(path: Path) -> Gguf:
    """read_gguf(), once for each state of a file and its folder."""
    try:
        state, folder = path.stat(), path.parent.stat()
    except OSError:
        return read_gguf(path)
    return _kept(path, state.st_mtime_ns, state.st_size, folder.st_mtime_ns)


@lru_cache(maxsize=4)
def _kept(path: Path, *state: int) -> Gguf:
    return read_gguf(path)


def _projector(gguf: Gguf) -> tuple[Gguf | None, tuple[str, ...]]:
    """The vision tower, if there is one, and what is to be said of it."""
    width = gguf.metadata.get(f"{gguf.metadata['general.architecture']}.embedding_length")
    fitting, others = [], []
    for path in projectors_beside(gguf.path):
        found = _read(path)
        if found.metadata.get("general.architecture") == PROJECTOR:
            (fitting if projected(found) == width else others).append(found)
    if not fitting:
        note = [
            f"{other.path} is the vision tower of another model (it projects to {projected(other)}, and this one is "
            f"{width} wide): the model is read for text only"
            for other in others[:1]
        ]
        return None, tuple(note)
    check_projector(fitting[0])
    note = f"{gguf.path.parent} has {len(fitting)} vision towers that fit: {fitting[0].path.name} is taken"
    return fitting[0], (note,) if len(fitting) > 1 else ()


def _with_head(gguf: Gguf) -> Gguf:
    """With the tensors of an MTP head that lies in a file of its own beside it."""
    trunk = trunk_layers(gguf)
    if mtp_layers(gguf, trunk):
        return gguf
    for path in heads_beside(gguf.path):
        head = _read(path)
        keys = ("general.architecture", f"{gguf.metadata['general.architecture']}.embedding_length")
        same = all(head.metadata.get(key) == gguf.metadata.get(key) for key in keys)
        if same and trunk_layers(head) == trunk:
            layers = {n: t for n, t in head.tensors.items() if n.startswith("blk.")}
            return replace(gguf, tensors=gguf.tensors | layers)
    return gguf
