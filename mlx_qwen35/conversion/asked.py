"""What a conversion is asked for, and what can be said against it before a weight is read or downloaded.

Knows arguments, and what may lie in the target's place. Writes nothing that stays.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

import mlx.core as mx

from mlx_qwen35.checkpoint import adapters
from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.quantize import default_spec
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.conversion import recipes
from mlx_qwen35.conversion.gguf.asked import check_config, check_plain, check_targets, is_gguf_target, read_outtype
from mlx_qwen35.conversion.journal import Refused, is_begun
from mlx_qwen35.conversion.partial import claim, container_of
from mlx_qwen35.conversion.resumed import check_unfinished
from mlx_qwen35.conversion.write import write_error
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import listed

NO_VERIFYING = "verify compares with the source, which an adapter changes: leave one of them out"


def check_request(
    target: str | Path,
    config: ModelConfig,
    *,
    bits: int | None = 4,
    group_size: int = 64,
    mode: str = "affine",
    recipe: str | None = None,
    target_size: int | None = None,
    dtype: mx.Dtype | str | None = None,
    adapter_path: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    verify: object = False,
    pack_experts: bool = False,
    outtype: str | None = None,
    **others: object,
) -> None:
    """Raises what `convert` would raise of these arguments for a source of this config, whose weights are not here yet.

    Leaves nothing on the disk. others: what cannot be wrong by then.
    """
    target = Path(target).expanduser()
    to_gguf = is_gguf_target(target, outtype)
    if to_gguf:
        check_plain(
            group_size=group_size != 64, mode=mode != "affine", recipe=recipe, target_size=target_size, dtype=dtype,
            verify=verify, pack_experts=pack_experts,
        )  # fmt: skip
        check_config(config, read_outtype(outtype, target.name), "the checkpoint")
    else:
        default = read_default(bits, group_size, mode, recipe, target_size)
        if default is not None:
            recipes.assign(recipe, text_tensors(config), default, config)
    if dtype is not None:
        compute_dtype(dtype)
    if adapter_path is not None:
        if verify:
            raise CheckpointError(NO_VERIFYING)
        adapters.check_fit(adapters.read_adapter(adapter_path), config)
    if not container_of(target).exists():
        (check_targets if to_gguf else check_target)(None, target, overwrite)
    there = next(path for path in (target.parent, *target.absolute().parents) if path.exists())
    if there != target.parent:
        if not os.access(there, os.W_OK):
            raise write_error(PermissionError(errno.EACCES, os.strerror(errno.EACCES)), there)
        return
    with claim(target) as partial:
        if is_begun(partial.journal):
            check_unfinished(partial, overwrite, resume)
        else:
            partial.discard()


def read_default(
    bits: int | None, group_size: int, mode: str, recipe: str | None, target_size: int | None
) -> QuantSpec | None:
    """The quantization that is asked for; None: none. Raises CheckpointError where arguments speak against each other
    or for what MLX has not."""
    default = None if bits is None else default_spec(bits, group_size, mode)
    if default is None and (recipe is not None or target_size is not None):
        raise CheckpointError("a recipe or target size says how to quantize, and bits=None not to: give one of them")
    if target_size is not None and (recipe is not None or default.mode != "affine"):
        other = f"recipe {recipe!r}" if recipe is not None else f"mode {default.mode!r}"
        raise CheckpointError(
            f"target_size chooses affine bits for every module, and {other} other ones: give one of them"
        )
    return default


def check_target(source: Path | None, target: Path, overwrite: bool) -> None:
    """Raises Refused for what is not to be replaced. source None: it is elsewhere."""
    if not os.path.exists(target):  # Path.exists() raises where the name is too long
        return
    if source is not None and target.resolve() in (source.resolve(), *source.resolve().parents):
        raise Refused(f"{target} is the source or holds it: choose another folder for the conversion")
    if not overwrite:
        raise Refused(f"{target} exists already: choose another folder, or overwrite it (--overwrite, overwrite=True)")
    if not target.is_dir() or (any(listed(target)) and not (target / "config.json").exists()):
        raise Refused(f"{target} is no checkpoint and is not overwritten: choose another folder")
