"""What a conversion to GGUF is asked for, and what can be said against it before a weight is read or downloaded.

Knows arguments, config.json and what may lie in the target's place. Writes nothing.
"""

from __future__ import annotations

from pathlib import Path

from mlx_qwen35.checkpoint.gguf.types import MAGIC
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.gguf.outtype import OUTTYPES, split_name, tower_name
from mlx_qwen35.conversion.journal import Refused
from mlx_qwen35.errors import ArgumentError, CheckpointError


def is_gguf_target(target: str | Path, outtype: str | None) -> bool:
    """Whether a target is a GGUF file, by its name. Raises ArgumentError where only `outtype` says so."""
    if str(target).endswith(".gguf"):
        return True
    if outtype is not None:
        raise ArgumentError(f"outtype is a type of GGUF files: give a target that ends in .gguf, not {target}")
    return False


def check_plain(**others: object) -> None:
    """Raises ArgumentError for arguments that are about MLX's forms. others: by name, those that were given."""
    given = [name for name, value in others.items() if value]
    if given:
        raise ArgumentError(f"{', '.join(given)} cannot be given for a GGUF file: outtype (--outtype) decides it")


def read_outtype(outtype: str | None, name: str) -> str:
    """The type that is asked for, as ggml spells it: `outtype`, or what the file's name ends in (model-Q8_0.gguf), or
    BF16. Raises ArgumentError for a type that is not written."""
    if outtype is None:
        return split_name(name)[1] or "BF16"
    if outtype.lower() not in OUTTYPES:
        raise ArgumentError(
            f"outtype is {outtype!r:.40}; GGUF is written as {', '.join(OUTTYPES)}. For other types write bf16, and "
            "give that file to llama-quantize"
        )
    return outtype.upper()


def check_config(config: ModelConfig, outtype: str, where: str) -> None:
    """Raises CheckpointError for what llama.cpp refuses or its metadata do not say. where: names the source."""
    text = config.text
    if text.linear_key_head_dim != text.linear_value_head_dim:
        raise CheckpointError(
            f"{where} has linear_key_head_dim {text.linear_key_head_dim} and linear_value_head_dim "
            f"{text.linear_value_head_dim}, and llama.cpp runs only models in which they are equal: convert it to an "
            "MLX folder instead"
        )
    yarn = text.rope.yarn
    if yarn and (yarn.mscale is not None or yarn.mscale_all_dim is not None or not yarn.truncate):
        raise CheckpointError(
            f"{where} has YaRN with mscale, mscale_all_dim or truncate, which the metadata of GGUF do not hold: take "
            "them out of rope_parameters, or give attention_factor in their place"
        )
    if config.vision and (config.vision.temporal_patch_size, config.vision.in_channels) != (2, 3):
        raise CheckpointError(
            f"{where} has a vision tower of {config.vision.temporal_patch_size} frames and "
            f"{config.vision.in_channels} channels in a patch; llama.cpp runs those of 2 and 3"
        )
    if outtype == "MXFP4" and text.moe is None:
        raise CheckpointError(f"mxfp4 is llama.cpp's type for experts, and {where} has none: take --outtype q4_0")


def check_targets(source: Path | None, target: Path, overwrite: bool) -> None:
    """Raises Refused for what is not to be replaced. source None: it is elsewhere."""
    for path in (target, target.with_name(tower_name(target.name))):
        if not path.exists():
            continue
        if not overwrite:
            raise Refused(f"{path} exists already: choose another name, or overwrite it (--overwrite, overwrite=True)")
        if source is not None and path.resolve() == source.resolve():
            raise Refused(f"{path} is the source: choose another name for the conversion")
        if not path.is_file() or path.open("rb").read(len(MAGIC)) != MAGIC:
            raise Refused(f"{path} is no GGUF file and is not overwritten: choose another name")
