"""GGUFs among the files of a repository on the Hub: which are the model that is meant, and what their headers say.

Knows names and how headers are told from what follows. Fetches nothing by itself, and no weight.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

from mlx_qwen35.checkpoint.gguf.choosing import heads_among, models_among, projectors_among, variant_of
from mlx_qwen35.checkpoint.gguf.container import header_size, named_files
from mlx_qwen35.errors import CheckpointError

Start = Callable[[str, int], bytes]  # (a file, how many bytes) -> its first bytes

# A first file has the vocabulary in its header, about 10 MB; others have names and sizes of tensors.
_FIRST_READ, _OTHER_READ, _MOST_READ = 12 << 20, 1 << 18, 1 << 26


class Headers:
    """A folder with the headers of some files, each as long as its file and empty behind the header; it is removed with
    this object."""

    def __init__(self, files: Mapping[str, int], start: Start):
        self.folder = Path(tempfile.mkdtemp(prefix="mlx-qwen35-headers-"))
        self._end = weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        for number, (name, size) in enumerate(files.items()):
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            _write(path, name, size, start, _OTHER_READ if number else _FIRST_READ)


def _write(path: Path, name: str, size: int, start: Start, count: int) -> None:
    while True:
        count = min(count, size)
        with open(path, "wb") as file:
            file.write(start(name, count))
            file.truncate(size)
        try:
            whole = header_size(path) <= count
        except CheckpointError:
            whole = False
        if whole or count in (size, _MOST_READ):  # a damaged one is for its reader to tell
            return
        count = min(2 * count, _MOST_READ)


def chosen(sizes: Mapping[str, int], wanted: str | None, name: str) -> dict[str, int]:
    """The files of the one model that is meant, name -> bytes, its first file first and its vision tower behind.

    sizes: of all files there. wanted: a file's name, or a quantization, such as Q4_K_M; None: the only one.
    Raises CheckpointError, with what there is, where none or several fit, and where some of its files are not there.
    """
    here = [Path(file) for file in sizes]
    models = sorted(models_among(here))
    fitting = models if wanted is None else _fitting(models, wanted)
    where = f"{name} on the Hugging Face Hub"
    if len(fitting) != 1:
        listed = _listed(fitting or models, sizes, name)
        if not models:
            raise CheckpointError(f"{where} holds no GGUF of a model: leave {wanted} out, or give a name that has some")
        if not fitting:
            raise CheckpointError(f"{where} has no GGUF {wanted}. It has:{listed}")
        raise CheckpointError(f"{where} holds {len(fitting)} GGUFs: give one of these names{listed}")
    parts = named_files(fitting[0])
    missing = [part.name for part in parts if str(part.as_posix()) not in sizes]
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(missing[:3])}, which the numbers of its files call for: the publisher's upload "
            "is not complete, choose another"
        )
    towers = projectors_among(here, fitting[0])[:1]
    return {path.as_posix(): sizes[path.as_posix()] for path in (*parts, *towers)}


def head_for(sizes: Mapping[str, int], first: str) -> list[str]:
    """The file of an MTP head for a model, by the name of its first file; [] where there is none."""
    return [path.as_posix() for path in heads_among([Path(file) for file in sizes], Path(first))[:1]]


def _fitting(models: list[Path], wanted: str) -> list[Path]:
    """By a file's name or path, a quantization, or the end of one: Q4_K_XL is UD-Q4_K_XL where there is no other."""
    wanted = wanted.lower()
    if wanted.endswith(".gguf"):
        files = {model: [part.as_posix().lower() for part in named_files(model)] for model in models}
        exact = [model for model in models if wanted in files[model]]
        return exact or [model for model in models if any(part.endswith(f"/{wanted}") for part in files[model])]
    variants = {model: variant_of(model) or "" for model in models}
    exact = [model for model in models if variants[model] == wanted]
    return exact or [model for model in models if variants[model].endswith(f"-{wanted}")]


def _listed(models: list[Path], sizes: Mapping[str, int], name: str) -> str:
    """Names to give, with sizes, the smallest first."""
    variants = [variant_of(model) for model in models]
    lines = []
    for model, variant in zip(models, variants, strict=True):
        known = variant is not None and variants.count(variant) == 1
        size = sum(sizes.get(part.as_posix(), 0) for part in named_files(model))
        lines.append((size, f"{name}:{variant.upper()}" if known else f"{name}/{model.as_posix()}"))
    wide = max((len(line) for _, line in lines), default=0)
    return "".join(f"\n  {line:{wide}}  {size / 1e9:.2f} GB" for size, line in sorted(lines))
