"""From a name to an MLX folder. Knows where sources come from; the work is checkpoint/convert.py's."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.checkpoint import convert as checkpoints
from mlx_qwen35.checkpoint.asked import check_request
from mlx_qwen35.library.finding import find

if TYPE_CHECKING:
    from mlx_qwen35.library.hub import Offer


@wraps(checkpoints.convert)
def convert(
    source: str | Path,
    target: str | Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    on_download: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Path:
    def check(offer: Offer) -> None:
        check_request(target, offer.config, **options)

    folder = find(source, on_progress=on_download or on_progress, check=check)
    return checkpoints.convert(folder, target, on_progress=on_progress, **options)


_taken = inspect.signature(checkpoints.convert)
_one_more = inspect.Parameter("on_download", inspect.Parameter.KEYWORD_ONLY, default=None)
convert.__signature__ = _taken.replace(parameters=[*_taken.parameters.values(), _one_more])
convert.__doc__ = f"""{checkpoints.convert.__doc__}
    source may be a name too, as `load` takes it: what is not on this machine is downloaded, once all else was checked.
    on_progress is then called for the download first, or on_download is, if it is given; each begins with (0, ..).
    """
