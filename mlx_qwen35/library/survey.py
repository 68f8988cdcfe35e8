"""What a checkpoint folder says of itself in its headers: geometry, quantization, what is missing.

Knows how to ask checkpoint's readers and how to go on where they refuse. Reads no weight and raises nothing for a
folder's faults.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mlx_qwen35.blocks.config import is_block_drafter
from mlx_qwen35.checkpoint.beside import MTP_FILES, TOWER_FILES
from mlx_qwen35.checkpoint.contents import read_config
from mlx_qwen35.checkpoint.files import missing_shards
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf, models_in
from mlx_qwen35.checkpoint.gguf.container import peek
from mlx_qwen35.checkpoint.gguf.form import GgufForm
from mlx_qwen35.checkpoint.gguf.metadata import DENSE, MOE
from mlx_qwen35.checkpoint.gguf.opened import open_model
from mlx_qwen35.checkpoint.inventory import text_tensors, vision_tensors
from mlx_qwen35.checkpoint.mtp import mtp_bytes
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.config import DENSE_TYPES, HADAMARD, MOE_TYPES, ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.stored import read_json
from mlx_qwen35.machine.files import listed

# Qwen3.5, 3.6, 3.8, however a publisher spells it; Qwen3-8B is of another family, and Qwen3.8-Flash-Next too.
_FAMILY = re.compile(r"qwen3(?:[._-]?[56]|[._]?8)(?![\db])(?!.*flash[._-]?next)", re.IGNORECASE)
_TOKENS = 248320  # of all published models of the family
_DTYPES = {"BF16": "bf16", "F16": "fp16", "F32": "fp32"}


@dataclass(frozen=True)
class Survey:
    """config: None where config.json cannot be read; source: None where files are missing or do not fit it; problem:
    why, in words; missing: shards that are not there."""

    folder: Path
    config: ModelConfig | None
    source: Source | None
    problem: str | None
    missing: tuple[str, ...] = ()

    @property
    def vision(self) -> bool:
        """Whether it can see: by its files where they can be read, else by config.json."""
        config = self.source.config if self.source else self.config
        return config is not None and config.vision is not None

    @cached_property
    def nbytes(self) -> int:
        """Of all weight files on the disk, MTP included."""
        if is_gguf(self.folder):
            return self._gguf_bytes()
        total = 0
        beside = [self.folder / name for name in (*MTP_FILES, *TOWER_FILES) if "/" in name]
        for path in (*listed(self.folder, "*.safetensors"), *beside):
            with suppress(OSError):
                total += path.stat().st_size
        return total

    def _gguf_bytes(self) -> int:
        """Of a model in GGUF, its vision tower included."""
        try:
            files = open_model(self.folder).files
        except CheckpointError:
            files = tuple(listed(self.folder, "*.gguf")) if self.folder.is_dir() else (self.folder,)
        total = 0
        for path in files:
            with suppress(OSError):
                total += path.stat().st_size
        return total

    @cached_property
    def mtp_bytes(self) -> int:
        """Of the MTP layer, in the shards or beside them; 0: there is none, or the files cannot be read."""
        return mtp_bytes(self.source) if self.source else 0

    @property
    def streams(self) -> bool | None:
        """Whether experts can stay on the disk: there are more than a token takes, in a form that is read from where it
        lies; None: the files cannot be read."""
        if self.source is None:
            return None
        moe = self.source.config.text.moe
        return moe is not None and moe.experts_per_token < moe.num_experts and self.source.streamable

    @cached_property
    def parameters(self) -> int:
        """Weights of the text model and the vision tower, as many as they were before any quantization."""
        config = self.source.config if self.source else self.config
        return parameters(config) if config else 0

    @property
    def bits_per_weight(self) -> float | None:
        """As stored: scales and what is not quantized count too."""
        if self.source is None:
            return None
        return 8 * sum(part.nbytes for part in self.source.parts.values()) / self.parameters

    @property
    def spec(self) -> QuantSpec | None:
        """The MLX quantization that config.json names first, whatever single modules have; None: there is none."""
        if self.source is not None and self.source.form is not None:
            return self.source.form.spec
        told = self.config.quantization if self.config else None
        return told.default if told else None

    @property
    def quantization(self) -> str:
        """In words: "4-bit", "mxfp4", "gptq 4-bit", "fp8", "bf16", ...; "?" where it is not known.

        Modules may have other bits than the name says: bits_per_weight counts them all.
        """
        if self.source is not None and isinstance(self.source.form, GgufForm):
            return f"gguf {self.source.form.label}"
        foreign = self.config.source_quantization if self.config else None
        if foreign is not None:
            grid = self.spec and {"affine": f"{self.spec.bits}-bit", "mxfp8": None}.get(self.spec.mode, self.spec.mode)
            return f"{foreign.get('quant_method')}{f' {grid}' if grid else ''}"
        if self.spec is not None:
            return f"{self.spec.bits}-bit" if self.spec.mode == "affine" else self.spec.mode
        if self.source is None:
            return "?"
        sizes: Counter[str] = Counter()
        for part in self.source.parts.values():
            sizes[part.dtype] += part.nbytes
        return _DTYPES.get(sizes.most_common(1)[0][0], "?")


def survey(folder: Path) -> Survey:
    """Look into a folder; a damaged one is a Survey with a problem."""
    config, missing = None, ()
    try:
        config = read_config(folder)
        missing = () if is_gguf(folder) else tuple(missing_shards(folder))
        found = Survey(folder, config, open_source(folder, config), None)
        found.mtp_bytes  # noqa: B018  - reads a header more
        return found
    except CheckpointError as error:
        return Survey(folder, config, None, str(error), missing)
    except OSError as error:
        return Survey(folder, config, None, f"{folder} cannot be read ({error}): check its permissions", missing)


def is_ours(folder: Path, name: str) -> bool:
    """Whether a folder is meant as one of this family: by its config.json, or, where that says nothing, by its name."""
    if is_gguf(folder):
        models = [folder] if not folder.is_dir() else models_in(folder)
        named = {peek(path, "general.architecture") for path in models} - {None, ""}
        return bool(named & {DENSE, MOE}) if named else bool(_FAMILY.search(name))
    raw = read_json(folder / "config.json")
    if is_block_drafter(raw):  # which all say "qwen3", also those for other families
        return raw.get("vocab_size") == _TOKENS or bool(_FAMILY.search(name))
    model_type = raw.get("model_type")
    if isinstance(model_type, str):
        return model_type in (*DENSE_TYPES, *MOE_TYPES, HADAMARD)
    return bool(_FAMILY.search(name) or _FAMILY.search(adapter_of(folder) or ""))


def adapter_of(folder: Path) -> str | None:
    """What an adapter says that its model is, "" where it says nothing; None: the folder holds no adapter alone."""
    path = folder / "adapter_config.json"
    if not path.is_file() or (folder / "config.json").exists():
        return None
    told = read_json(path)
    return next((told[key] for key in ("base_model_name_or_path", "model") if isinstance(told.get(key), str)), "")


def parameters(config: ModelConfig) -> int:
    """Weights of the text model and the vision tower."""
    shapes = text_tensors(config) | vision_tensors(config)
    return sum(math.prod(shape) for shape in shapes.values())
