"""From a checkpoint of any form to GGUF files: the order of the work, and what is refused.

Knows what `conversion.convert` knows for folders; here the target is a file, and another beside it for the vision
tower. Both lie in the hidden folder until they are complete, the text model's gets its name last.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

from mlx_qwen35.checkpoint import adapters
from mlx_qwen35.checkpoint.companions import companions
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion import pipeline
from mlx_qwen35.conversion.gguf.asked import check_targets, read_outtype
from mlx_qwen35.conversion.gguf.plan import GgufPlan, plan_gguf
from mlx_qwen35.conversion.gguf.tensors import GgufPiece
from mlx_qwen35.conversion.journal import Journal, Refused
from mlx_qwen35.conversion.partial import Partial, claim, container_of
from mlx_qwen35.conversion.resumed import OnProgress, Progress, check_unfinished, clean_up, digest, left_to_do
from mlx_qwen35.conversion.write import WriteError, shown_size, write_error
from mlx_qwen35.machine.files import flush_names


def convert_gguf(
    source: str | Path,
    target: str | Path,
    *,
    outtype: str | None = None,
    adapter_path: str | Path | None = None,
    overwrite: bool = False,
    resume: bool = False,
    on_progress: OnProgress | None = None,
    on_note: Callable[[str], None],
) -> Path:
    """Write the checkpoint at `source` as the GGUF file `target`, and its vision tower, if it has one, as
    TARGET-mmproj.gguf beside it; -> target.

    outtype: f32, f16, bf16, q8_0, q4_0, q4_1 or mxfp4; None: by the name (model-Q8_0.gguf), else bf16. on_note: called
    with a line where weights are too small for the type's scales. Other arguments
    and errors as in `conversion.convert.convert`; CheckpointError too for what llama.cpp does not run.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    kind = read_outtype(outtype, target.name)
    if not container_of(target).exists():
        check_targets(source, target, overwrite)
    origin = open_source(source)
    origin.check_norms()
    adapter = None if adapter_path is None else adapters.read_adapter(adapter_path)
    updates = None if adapter is None else adapters.updates(adapter, origin.config)
    beside = {companion.name: companion for companion in companions(origin.folder)}
    plans = plan_gguf(origin, lambda name: beside[name].read() if name in beside else None, target, kind, updates)
    headers = hashlib.sha256(b"".join(plan.header[0] for plan in plans)).hexdigest()
    with claim(target) as partial:
        journal = Journal(partial.journal, {"outtype": kind}, digest(origin, adapter) + headers)
        try:
            if resume:
                journal.resume()
            if not journal.finished:
                check_targets(source, target, overwrite)
                check_unfinished(partial, overwrite, resume)
                if not journal.done:
                    partial.clear()
                    journal.start({})
                _write(plans, partial, journal, on_progress)
                _tell_faint(journal, kind, on_note)
                journal.finish()
            _give_names(plans, partial, overwrite)
            partial.discard()
        except BaseException as error:
            clean_up(error, partial)
            raise
        finally:
            journal.close()
    return target


def _write(plans: list[GgufPlan], partial: Partial, journal: Journal, on_progress: OnProgress | None) -> None:
    """Fill the files in the hidden folder."""
    _check_space(plans, partial)
    try:
        partial.folder.mkdir(exist_ok=True)
    except OSError as error:
        raise write_error(error, partial.folder) from error
    progress = Progress(sum(tensor.task.nbytes for plan in plans for tensor in plan.tensors), on_progress)
    files = [plan.file(partial.folder) for plan in plans]
    try:
        for file in files:
            file.open()
        pieces = [piece for plan, file in zip(plans, files, strict=True) for piece in plan.pieces(file)]

        def note(piece: GgufPiece, written: tuple[list[str], tuple[int, int]]) -> None:
            sums, counts = written
            journal.record(piece.name, sums, [*counts])
            progress.add(piece.nbytes)

        pipeline.run(left_to_do(pieces, journal, progress), GgufPiece.write, note)
        for file in files:
            file.sync()
    finally:
        for file in files:
            file.close()


def _tell_faint(journal: Journal, outtype: str, say: Callable[[str], None]) -> None:
    """Of weights that are lost because a float16 scale cannot be that small, which llama.cpp's tools do not tell."""
    few: Counter[str] = Counter()
    blocks: Counter[str] = Counter()
    for piece, counts in journal.lost.items():
        name = piece.rpartition(":")[0]
        few[name] += counts[0]
        blocks[name] += counts[1]
    shares = {name: few[name] / blocks[name] for name in few if few[name]}
    if shares:
        most = max(shares, key=shares.__getitem__)
        say(
            f"{outtype} loses weights that are too small for its float16 numbers in {len(shares)} tensors, at most "
            f"{shares[most]:.2%} of its groups ({most}): --outtype bf16 keeps them"
        )


def _give_names(plans: list[GgufPlan], partial: Partial, overwrite: bool) -> None:
    """Move the files to their places; one that lies there already went before an interruption."""
    for plan in reversed(plans):
        made, path = partial.folder / plan.name, partial.target.with_name(plan.name)
        if not made.exists():
            continue
        if path.exists() and not overwrite:
            raise Refused(f"{path} appeared during the conversion: move it, and go on with --resume")
        try:
            made.replace(path)
        except OSError as error:
            raise write_error(error, path) from error
    flush_names(partial.target.parent)


def _check_space(plans: list[GgufPlan], partial: Partial) -> None:
    paths = (partial.folder / plan.name for plan in plans)
    there = sum(path.stat().st_blocks * 512 for path in paths if path.exists())
    needed = sum(plan.nbytes for plan in plans) - there
    free = shutil.disk_usage(partial.container).free
    if needed > free:
        raise WriteError(
            f"{partial.target.parent} has {shown_size(free)} free and the conversion needs {shown_size(needed)}: "
            "free some space, or choose another disk or a smaller type"
        )
