"""From a name to a Model and a Processor.

Knows the order in which a checkpoint is read. Knows neither where folders are looked for nor what their files hold.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35 import checks
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.adapters import check_loadable, load_adapter, read_adapter
from mlx_qwen35.checkpoint.companions import small_files
from mlx_qwen35.checkpoint.load import compute_dtype, read_config
from mlx_qwen35.checkpoint.load import load_model as read_model
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.library.beforehand import check_offer
from mlx_qwen35.library.drafting import drafting_bytes, load_head
from mlx_qwen35.library.finding import find
from mlx_qwen35.library.holding import Held, hold
from mlx_qwen35.library.kernel_check import check_kernels
from mlx_qwen35.library.memory import memory_size
from mlx_qwen35.machine.system import cache_folder
from mlx_qwen35.processor import Processor

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.library.hub import Offer
    from mlx_qwen35.model import Model

__all__ = ["load", "load_model", "load_processor"]


def load(
    ref: str | Path | None = None,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    yarn: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    dtype: mx.Dtype | str | None = None,
    adapter_path: str | Path | None = None,
    mtp: bool = False,
    exact: bool = False,
    kernels: bool = True,
    warm_start: bool = True,
    ranks: int | None = None,
    plan: str | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> tuple[Model, Processor]:
    """The model and the processor (tokenizer, chat template, defaults) of a checkpoint.

    ref: a name or a folder, as `find` understands it; None is the small trained demo inside this package. What is not
    on this machine is downloaded. dtype: to compute in; None is float32 on the CPU and bfloat16 on a GPU.
    memory: the most that this process may take, in bytes or as "24GB" or "60%" of what there is. Experts that do not
    fit are read from the disk when they are chosen: the answers stay the same (docs/EXACTNESS.md). None: experts are
    streamed only where the model does not fit into what MLX recommends on this Mac, or what is free.
    context_length: the most tokens to allow, at most what the checkpoint allows. None is all of it; under a ceiling the
    longest that fits, and 32,768 or fewer where experts are streamed.
    yarn: for a context_length above what the checkpoint allows, stretch positions so that it reaches up to 1,010,000
    tokens. All answers change with it, those to short prompts too, a little for the worse.
    kv_bits: 4 or 8 keeps keys and values in so many bits, in groups of kv_group_size values, from position
    quantized_kv_start on. That is not exact (docs/SESSIONS.md).
    warm_start: where experts are streamed, those that were in memory at last are read again in the background, until
    the first prompt; `unload` writes down which they are, in a folder of the user's cache. False: neither.
    adapter_path: a LoRA adapter to put on the model, a folder as mlx-lm's trainer writes it (`fuse` merges it).
    mtp: read its MTP head too (`model.mtp`), which then drafts tokens ahead (docs/SPECULATIVE.md).
    exact: give up to 8 rows of a call (drafted tokens, a batch) the bits that each has alone, and streamed experts
    those of resident ones, on a GPU too, whose products do not promise it. It has a price, and an adapter has to be
    merged first: docs/EXACTNESS.md.
    kernels: on a GPU, let kernels of this package take the place of MLX's operations where they stand a short test,
    whose result is kept in the user's cache (docs/KERNELS.md). False: MLX's operations alone.
    ranks: have the model on so many ranks (docs/DISTRIBUTED.md): those that `mlx.launch` has started, or processes of
    this machine, started here, which share `memory`. What this returns is rank 0's; on the other ranks it never
    returns: they follow until rank 0 ends, and end the process. plan: "experts", "pipeline" or "tensor"; None chooses.
    on_progress: called with (bytes done, bytes in all), of the download where there is one, then of the weights, each
    beginning with (0, ..). What it raises ends the work, and so does Ctrl-C; nothing is left in memory then, and on the
    disk only files that are complete.
    Raises CheckpointError if nothing has that name, if something in it is missing, damaged or not supported, or if it
    does not fit into memory, with figures; before a weight is read, and as far as its config.json tells, downloaded.
    """
    checks.path("adapter_path", adapter_path, optional=True)
    checks.flag("mtp", mtp)
    _check_flags(yarn, warm_start, on_progress)
    checks.flag("kernels", kernels)
    check_exact(exact, adapter_path)
    adapter = None if adapter_path is None else read_adapter(adapter_path)
    form = None if kv_bits is None else KVFormat(kv_bits, kv_group_size, quantized_kv_start)
    chosen = {"dtype": dtype, "context_length": context_length, "yarn": yarn, "kv_form": form}
    checks.whole("ranks", ranks, 1, otherwise="for one process")
    if ranks is None and plan is not None:
        raise ArgumentError(f"plan is {plan!r}, but ranks is not given: give both, or neither")
    memory_size(memory), compute_dtype(dtype)  # raise before anything is downloaded

    def check(offer: Offer) -> None:
        check_offer(offer, memory, **chosen, mtp=mtp, adapter=adapter)

    folder = find(ref, on_progress=on_progress, check=check)
    if mtp:
        from mlx_qwen35.library.hub import complete_head

        complete_head(folder, on_progress)
    if ranks is not None and ranks > 1:
        from mlx_qwen35.library.ranked import load_ranked

        how = {"exact": exact, "kernels": kernels, "warm_start": warm_start, "on_progress": on_progress}
        return load_ranked(folder, ranks, plan, memory=memory, mtp=mtp, adapter_path=adapter_path, **chosen, **how)
    held = hold(folder, memory, **chosen, beside=drafting_bytes(folder, mtp, None, dtype))
    # The small files first: a tokenizer that is missing should not be found out after minutes of weights.
    processor = load_processor(folder, context_length=held.context_length, yarn=yarn)
    if adapter is not None:
        check_loadable(adapter, read_config(folder))
    model = load_held(held, exact=exact, kernels=kernels, warm_start=warm_start, on_progress=on_progress)
    if mtp:
        model.take_mtp(load_head(folder, model, dtype=dtype, on_progress=on_progress))
    return model if adapter is None else load_adapter(model, adapter), processor


def load_model(
    folder: str | Path,
    *,
    memory: int | str | None = None,
    context_length: int | None = None,
    yarn: bool = False,
    kv_bits: int | None = None,
    kv_group_size: int = 64,
    quantized_kv_start: int = 0,
    dtype: mx.Dtype | str | None = None,
    exact: bool = False,
    kernels: bool = True,
    warm_start: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model of a checkpoint folder; needs no tokenizer. Arguments and errors as in `load`.

    Quantized weights stay as they are, but FP8, which MLX does not compute with: it is dequantized and cast.
    """
    checks.path("folder", folder)
    _check_flags(yarn, warm_start, on_progress)
    checks.flag("kernels", kernels)
    form = None if kv_bits is None else KVFormat(kv_bits, kv_group_size, quantized_kv_start)
    held = hold(folder, memory, dtype=dtype, context_length=context_length, yarn=yarn, kv_form=form)
    return load_held(held, exact=exact, kernels=kernels, warm_start=warm_start, on_progress=on_progress)


def load_held(
    held: Held,
    *,
    exact: bool = False,
    kernels: bool = True,
    warm_start: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """The model, as hold() decided. The other arguments as in `load`."""
    model = read_model(
        held.folder,
        dtype=held.dtype,
        context_length=held.context_length,
        yarn=held.yarn,
        kv_form=held.kv_form,
        stream=held.stream,
        hot_lists=_hot_lists() if warm_start else None,
        on_progress=on_progress,
    )
    if held.bounded:
        model.snapshot_bytes = 0  # the fewest, which is what was planned for
    if exact:
        model.be_exact()
    model.kernels = kernels
    check_kernels(model, wanted=kernels)
    return model


def check_exact(exact: bool, adapter_path: str | Path | None) -> None:
    """Raises ArgumentError where exact cannot be kept."""
    if exact and adapter_path is not None:
        raise ArgumentError(
            "exact=True does not hold for an adapter beside the weights, whose products MLX computes for all rows at "
            "once: merge it first (mlx_lm.fuse), or leave exact out"
        )


def load_processor(
    ref: str | Path | None = None,
    *,
    context_length: int | None = None,
    yarn: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> Processor:
    """The processor alone: prompts are made, and refused, without reading a weight. Arguments and errors as in `load`.

    `load_model(find(ref), context_length=...)` is the model that belongs to it. A ceiling on memory may allow fewer
    tokens than the checkpoint does: `hold` says how many.
    """
    _check_flags(yarn, True, on_progress)
    folder = find(ref, on_progress=on_progress)
    return Processor.from_folder(small_files(folder), read_config(folder, context_length, yarn=yarn))


def _check_flags(yarn: Any, warm_start: Any, on_progress: Any) -> None:
    """Raises ArgumentError for what is neither True nor False, and what cannot be called."""
    checks.flag("yarn", yarn)
    checks.flag("warm_start", warm_start)
    checks.called("on_progress", on_progress)


def _hot_lists() -> Path:
    """Where is kept which experts were in memory at last."""
    return cache_folder() / "hot-experts"
