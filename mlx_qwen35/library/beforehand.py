"""What can be said against loading a model before it is downloaded, by its config.json and the sizes of its files, or
by the header of a GGUF.

Knows what `hold` and `load` would find out later. Fetches nothing of the model itself.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from mlx_qwen35.checkpoint.adapters import check_loadable
from mlx_qwen35.checkpoint.context import with_context
from mlx_qwen35.checkpoint.load import check_kv_form, compute_dtype
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.drafting import NO_ANSWERS, told_drafting
from mlx_qwen35.library.footprint import weight_bytes
from mlx_qwen35.library.holding import decide, of_source
from mlx_qwen35.library.memory import memory_size
from mlx_qwen35.library.told import told_demand, told_specs
from mlx_qwen35.machine.gpu import has_metal

if TYPE_CHECKING:
    import mlx.core as mx

    from mlx_qwen35.cache.kv import KVFormat
    from mlx_qwen35.checkpoint.adapters import Adapter
    from mlx_qwen35.library.hub import Offer

_DOUBTFUL = 1.2  # times the files: so much more than these is told only where config.json does not know all of them


def check_offer(
    offer: Offer,
    memory: int | str | None = None,
    *,
    dtype: mx.Dtype | str | None = None,
    context_length: int | None = None,
    yarn: bool = False,
    kv_form: KVFormat | None = None,
    mtp: bool = False,
    draft_model: str | Path | None = None,
    adapter: Adapter | None = None,
) -> None:
    """Raises what `load` would raise of these arguments: a context that is too long, memory that is too little, another
    vocabulary than the draft model's, an adapter that does not fit, ... Arguments as in `load`; draft_model: its name,
    of which nothing is fetched.

    Never more than `hold` would say: where config.json may not tell the size of the weights, memory is left to that.
    """
    size, where = memory_size(memory)
    if offer.is_drafter:
        raise CheckpointError(NO_ANSWERS.format(offer.name))
    config = with_context(offer.config, context_length, yarn=yarn, where=offer.name)
    check_kv_form(kv_form, config)
    if adapter is not None:
        check_loadable(adapter, config)
    mtp = mtp and config.text.mtp_num_hidden_layers > 0  # else the files decide
    beside = told_drafting(config, mtp, draft_model, dtype, where=offer.name, folder=offer.gguf)
    if memory is None and config.text.moe is None and not has_metal():
        return
    found = where if memory is None else None
    if offer.gguf is not None:  # whose headers tell all
        demand = of_source(open_source(offer.gguf, config), compute_dtype(dtype))
        decide(replace(demand, kv_form=kv_form, beside=beside), size, context_length, found, offer.name)
        return
    # The least: whether there is a vision tower, and what reading takes for a moment, the files say.
    config = replace(config, vision=None)
    demand = told_demand(config, told_specs(config), compute_dtype(dtype))
    if config.quantization is not None or (config.source_quantization or {}).get("quant_method") not in (None, "fp8"):
        files = sum(size for name, size in offer.files.items() if name.endswith(".safetensors"))
        if weight_bytes(config, demand.specs, demand.itemsize).total > _DOUBTFUL * files:
            return
    demand = replace(demand, kv_form=kv_form, beside=beside, loading=0, loading_layer=0)
    decide(demand, size, context_length, found, offer.name)
