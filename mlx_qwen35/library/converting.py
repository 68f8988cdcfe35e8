"""From a name to an MLX folder or a GGUF file. Knows where sources come from; the work is conversion/convert.py's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from mlx_qwen35 import checks
from mlx_qwen35.conversion import convert as checkpoints
from mlx_qwen35.conversion.asked import check_request
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.library.finding import find
from mlx_qwen35.library.plan import parse_size

if TYPE_CHECKING:
    import mlx.core as mx
    from typing_extensions import Unpack

    from mlx_qwen35.conversion.verify import Verification
    from mlx_qwen35.library.hub import Offer


class ConvertOptions(TypedDict, total=False):
    """Of `convert`, as conversion/convert.py has them, for type checkers."""

    bits: int | None
    group_size: int
    mode: str
    recipe: str | None
    target_size: int | str | None
    dtype: mx.Dtype | str | None
    adapter_path: str | Path | None
    overwrite: bool
    resume: bool
    verify: bool | Callable[[Verification], None]
    pack_experts: bool
    outtype: str | None
    on_measure: Callable[[int, int], None] | None
    on_note: Callable[[str], None] | None


_OF_MLX_LM = {"hf_path": "source", "mlx_path": "target", "quant_predicate": "recipe", "quantize": "bits"}


@wraps(checkpoints.convert)
def convert(
    source: str | Path,
    target: str | Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_download: Callable[[int, int], None] | None = None,
    **options: Unpack[ConvertOptions],
) -> Path:
    _check_arguments(target, {**options, "on_progress": on_progress, "on_download": on_download})
    if isinstance(options.get("target_size"), str):
        options["target_size"] = parse_size(options["target_size"])

    def check(offer: Offer) -> None:
        if offer.blocks is None:
            check_request(target, offer.config, **options)

    folder = find(source, on_progress=on_download or on_progress, check=check)
    return checkpoints.convert(folder, target, on_progress=on_progress, **options)


def _check_arguments(target: Any, options: Mapping[str, Any]) -> None:
    """Raises ArgumentError for names that there are not, and for values of another type."""
    for name, value in options.items():
        if name not in convert.__signature__.parameters:
            known = checks.suggestion(_OF_MLX_LM.get(name, name), convert.__signature__.parameters)
            raise ArgumentError(f"convert has no argument {name!r}{known}")
        if name == "bits":
            checks.whole(name, value, 1, otherwise="leaves the weights unquantized")
        elif name == "group_size":
            checks.whole(name, value, 1)
        elif name in ("overwrite", "resume", "pack_experts"):
            checks.flag(name, value)
        elif name.startswith("on_"):
            checks.called(name, value)
        elif name in ("mode", "recipe", "outtype"):
            checks.text(name, value, optional=name != "mode")
        elif name == "target_size" and not isinstance(value, str):
            checks.whole(name, value, 1, otherwise="leaves the size to bits")
        elif name == "adapter_path":
            checks.path(name, value, optional=True)
        elif name == "verify" and not callable(value):
            checks.flag(name, value)
    checks.path("target", target)


_taken = inspect.signature(checkpoints.convert)
_one_more = inspect.Parameter("on_download", inspect.Parameter.KEYWORD_ONLY, default=None)
convert.__signature__ = _taken.replace(parameters=[*_taken.parameters.values(), _one_more])
convert.__doc__ = f"""{checkpoints.convert.__doc__}
    source may be a name too, as `load` takes it: what is not on this machine is downloaded, once all else was checked.
    on_progress is then called for the download first, or on_download is, if it is given; each begins with (0, ..).
    target_size may be a text, such as "100GB".
    """
