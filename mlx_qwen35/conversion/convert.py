"""From a checkpoint of any layout to an MLX folder that mlx-lm, mlx-vlm and this package load.

Knows the order of the work, and what is refused. The tensors go from files to files in pieces, on all cores: memory
does not grow with the model, and no Model is built. What is written does not depend on the number of cores, nor on how
often the work was interrupted.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Container
from dataclasses import astuple
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_qwen35.checkpoint import adapters
from mlx_qwen35.checkpoint.blocks import is_blocks
from mlx_qwen35.checkpoint.companions import companions
from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion import allotment, pipeline, recipes
from mlx_qwen35.conversion.asked import NO_VERIFYING, check_target, read_default
from mlx_qwen35.conversion.blocks import convert_blocks
from mlx_qwen35.conversion.gguf.asked import check_plain, is_gguf_target
from mlx_qwen35.conversion.gguf.convert import convert_gguf
from mlx_qwen35.conversion.journal import Journal, is_begun
from mlx_qwen35.conversion.loss import Loss
from mlx_qwen35.conversion.partial import Partial, claim, container_of
from mlx_qwen35.conversion.piece import Piece, pieces, safetensors_files
from mlx_qwen35.conversion.plan import Plan, make_plan
from mlx_qwen35.conversion.records import LayerRecords, layer_records
from mlx_qwen35.conversion.resumed import OnProgress, Progress, check_unfinished, clean_up, digest, left_to_do
from mlx_qwen35.conversion.suiting import check_losses, suited
from mlx_qwen35.conversion.verify import Verification, check_memory
from mlx_qwen35.conversion.verify import verify as check
from mlx_qwen35.conversion.write import WriteError, make_durable, shown_size, write_error, write_index, write_json
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.machine.files import allow_open, listed


def convert(
    source: str | Path,
    target: str | Path,
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
    verify: bool | Callable[[Verification], None] = False,
    pack_experts: bool = False,
    outtype: str | None = None,
    on_progress: OnProgress | None = None,
    on_measure: OnProgress | None = None,
    on_note: Callable[[str], None] | None = None,
) -> Path:
    """Write the checkpoint in folder `source` as an MLX checkpoint into folder `target`, and return that.

    bits: 2, 3, 4, 5, 6 or 8; None leaves the weights unquantized. group_size: 32, 64 or 128. mode: "affine", or
    "mxfp4", "mxfp8", "nvfp4", which fix bits and group_size. recipe: a name of recipes.RECIPES, which gives modules
    bits by their role. target_size: bytes that the checkpoint is to have at most; it chooses affine bits for every
    module, in groups of group_size or more, and goes with neither a recipe nor another mode.
    dtype: of what is not quantized; None keeps the source's. Vision tensors and mtp.* are not quantized. FP8 is
    dequantized in float32 and packed from that. What is affine already, GPTQ's integers included, goes over as it is
    where it is to have as many bits or more; recipe "uniform" alone gives other groups and more bits.
    adapter_path: a LoRA, DoRA or whole-layer adapter as mlx-lm's trainer writes it, which is merged in float32.
    overwrite: replace an existing `target`, and discard an unfinished conversion to it. resume: go on with an
    unfinished one, if there is any. verify: read everything back before the target gets its name, and compare weights
    and logits with the source (verify.py); a function gets the report. pack_experts: add expert records (records.py),
    which repeat the experts' bytes in the order in which streaming reads them. on_progress: called with (bytes read,
    bytes in all); on_measure: before that, where target_size is given, with (modules measured, modules in all).
    on_note: called with a line on each module that gets another quantization, because the one that was asked for would
    spoil it, and on weights that are lost because they are small; None: they are warnings.
    A target that ends in .gguf is one file for llama.cpp, and one for the vision tower beside it (TARGET-mmproj.gguf).
    outtype says its type: "f32", "f16", "bf16", "q8_0", "q4_0", "q4_1" or "mxfp4" (experts; the rest q8_0); None takes
    it from the name (model-Q8_0.gguf), else bf16. What is about MLX's forms, and verify, is refused with it.
    Raises CheckpointError for a source that cannot be read or is already what is asked for, weights that are NaN or
    infinite, or that are lost in the target (each module is held against its source while both are there), an existing
    target, an unfinished conversion to it, another one at the same time, a quantization that MLX does not have and a
    full disk. `target` appears only when it is complete. What an interruption (Ctrl-C, a kill, a full disk) leaves is a
    hidden folder beside it, which no loader takes for a checkpoint.
    A block drafter (DFlash, DFlash2) is written with bits, group_size, mode, dtype and overwrite; what else is asked of
    it is refused.
    """
    if is_blocks(source):
        return convert_blocks(
            Path(source).expanduser(), Path(target).expanduser(), bits=bits, group_size=group_size, mode=mode,
            dtype=dtype, overwrite=overwrite, on_progress=on_progress, recipe=recipe, target_size=target_size,
            adapter_path=adapter_path, verify=verify, pack_experts=pack_experts,
            gguf=is_gguf_target(target, outtype),
        )  # fmt: skip
    say = on_note or (lambda line: warnings.warn(line, stacklevel=3))
    if is_gguf_target(target, outtype):
        check_plain(
            group_size=group_size != 64, mode=mode != "affine", recipe=recipe, target_size=target_size, dtype=dtype,
            verify=verify, pack_experts=pack_experts,
        )  # fmt: skip
        return convert_gguf(
            source, target, outtype=outtype, adapter_path=adapter_path, overwrite=overwrite, resume=resume,
            on_progress=on_progress, on_note=say,
        )  # fmt: skip
    default = read_default(bits, group_size, mode, recipe, target_size)
    wanted = None if dtype is None else compute_dtype(dtype)
    source, target = Path(source).expanduser(), Path(target).expanduser()
    if not container_of(target).exists():
        check_target(source, target, overwrite)  # at once; below it is looked at again, with the lock
    origin = open_source(source)
    origin.check_norms()
    _check_companions(origin.folder)
    adapter = None if adapter_path is None else adapters.read_adapter(adapter_path)
    updates = None if adapter is None else adapters.updates(adapter, origin.config)
    if verify and adapter:
        raise CheckpointError(NO_VERIFYING)
    if verify:
        check_memory(origin)
    asked = {
        "quantization": default and [default.bits, default.group_size, default.mode],
        "recipe": recipe,
        "target_size": target_size,
        "dtype": wanted and str(wanted).removeprefix("mlx.core."),
        "pack_experts": pack_experts,
    }
    with claim(target) as partial:
        journal = Journal(partial.journal, asked, digest(origin, adapter))
        try:
            if resume:
                journal.resume()
            if not (journal.finished and target.exists() and not partial.folder.exists()):
                check_target(source, target, overwrite)
                check_unfinished(partial, overwrite, resume)
                if journal.assignment is None:
                    partial.clear()
                    found = _assignment(origin, default, recipe, target_size, wanted, updates or {}, on_measure)
                    if found is not None and target_size is None:
                        found, notes = suited(origin, found, wanted, updates or {})
                        for line in notes:
                            say(line)
                    journal.start(_to_json(found))
                search = target_size is not None or recipes.searches(recipe)
                plan = make_plan(origin, _from_json(journal.assignment), default, wanted, search, updates)
                found = _convert(plan, partial, journal, bool(verify), pack_experts, on_progress, say)
                if callable(verify) and found:
                    verify(found)
                journal.finish()
                partial.finish(overwrite)
            partial.discard()
        except BaseException as error:
            clean_up(error, partial)
            raise
        finally:
            journal.close()
    return target


def unfinished(target: str | Path) -> bool:
    """Whether an interrupted conversion to `target` left work that `resume` goes on with."""
    return is_begun(container_of(Path(target).expanduser()) / "journal")


def _convert(
    plan: Plan,
    partial: Partial,
    journal: Journal,
    verifying: bool,
    packing: bool,
    on_progress: OnProgress | None,
    say: Callable[[str], None],
) -> Verification | None:
    """Fill the partial folder; config.json comes last, because a folder without it is no checkpoint to anybody."""
    if plan.is_done_already() and not packing:
        raise CheckpointError(
            f"{plan.origin.folder} is already an MLX checkpoint with what was asked for, or with fewer bits, to which "
            "more would restore nothing: use it as it is, or copy it"
        )
    folder = partial.folder
    files = safetensors_files(plan, folder)
    records = layer_records(plan, files, folder) if packing else []
    _check_space(plan, partial, sum(layer.nbytes for layer in records))
    try:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").unlink(missing_ok=True)
    except OSError as error:
        raise write_error(error, folder) from error
    whole = sum(task.nbytes for task in plan.tasks)
    progress = Progress(sum(layer.nbytes for layer in records) + (3 if verifying else 1) * whole, on_progress)
    try:
        allow_open(2 * len(files))
        for file in files.values():
            file.open()
        all_pieces = list(pieces(plan, files))
        todo = left_to_do([*all_pieces, *records], journal, progress)

        def note(piece: Piece | LayerRecords, written: tuple[list[str], Loss | None]) -> None:
            sums, lost = written
            journal.record(piece.name, sums, lost and list(astuple(lost)))
            progress.add(piece.nbytes)

        pipeline.run([piece for piece in todo if isinstance(piece, Piece)], Piece.write, note)
        check_losses(all_pieces, journal.lost, say)
        # Records are made of what the pieces wrote.
        pipeline.run([piece for piece in todo if isinstance(piece, LayerRecords)], LayerRecords.write, note)
        for file in files.values():
            file.sync()
        write_index(folder, plan.shards)
        _write_companions(plan.origin.folder, folder)
        write_json(folder / "config.json", plan.config())
        make_durable(folder)
        return check(plan, folder, all_pieces, journal.done, progress.add) if verifying else None
    finally:
        for file in files.values():
            file.close()


def _assignment(
    origin: Source,
    default: QuantSpec | None,
    recipe: str | None,
    target_size: int | None,
    dtype: mx.Dtype | None,
    updated: Container[str],
    on_measure: OnProgress | None,
) -> dict[str, QuantSpec | None] | None:
    """How each linear module of the text model is to be quantized; None: not at all. updated: the weights that an
    adapter changes."""
    if default is None:
        return None
    if target_size is None:
        asked = recipes.assign(recipe, text_tensors(origin.config), default, origin.config)
        there = {module: origin.carried(module) for module in asked if f"{module}.weight" not in updated}
        return {
            module: there[module] if _is_kept(origin, there.get(module), spec, recipe) else spec
            for module, spec in asked.items()
        }
    rest = make_plan(origin, None, None, dtype)
    beside = sum(spec.nbytes for task in rest.vision + rest.mtp for spec in task.specs().values())
    beside += sum(companion.nbytes for companion in companions(origin.folder))
    return allotment.fit(
        origin, target_size, beside=beside, group_size=default.group_size, dtype=dtype, on_progress=on_measure
    )


def _is_kept(origin: Source, had: QuantSpec | None, asked: QuantSpec | None, recipe: str | None) -> bool:
    """Whether a quantized module goes over as it is, though a recipe asks for another form.

    More bits would not bring back what it lost, and other groups of as many bits would only be other. "uniform" means
    its bits and groups all the same; there only what another tool quantized keeps those groups in which it is exact.
    """
    if had is None or asked is None or had.mode != asked.mode:
        return False
    if recipe == "uniform":
        return origin.form is not None and had.bits == asked.bits
    return had.bits <= asked.bits


def _to_json(assignment: dict[str, QuantSpec | None] | None) -> dict[str, Any]:
    """{} stands for None."""
    found = assignment or {}
    return {module: spec and [spec.bits, spec.group_size, spec.mode] for module, spec in found.items()}


def _from_json(value: dict[str, Any] | None) -> dict[str, QuantSpec | None] | None:
    return {module: spec and QuantSpec(*spec) for module, spec in value.items()} if value else None


def _check_companions(source: Path) -> None:
    """Before the work: a target without its tokenizer would load, and not speak."""
    for companion in companions(source):
        companion.check()


def _write_companions(source: Path, folder: Path) -> None:
    """LM Studio loads offline: all that the source has goes along."""
    for companion in companions(source):
        data = companion.read()
        try:
            (folder / companion.name).write_bytes(data)
        except OSError as error:
            raise write_error(error, folder / companion.name) from error


def _check_space(plan: Plan, partial: Partial, beside: int) -> None:
    there = sum(path.stat().st_blocks * 512 for path in listed(partial.folder, "**/*") if path.is_file())
    needed = plan.nbytes + beside + sum(companion.nbytes for companion in companions(plan.origin.folder)) - there
    free = shutil.disk_usage(partial.container).free
    if needed > free:
        raise WriteError(
            f"{partial.target.parent} has {shown_size(free)} free and the conversion needs {shown_size(needed)}: "
            "free some space, choose another disk or fewer bits"
        )
