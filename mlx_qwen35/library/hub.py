"""Downloads from the Hugging Face Hub into its cache.

Knows which files of a repository a checkpoint needs, in which order they may arrive, and how a download is watched,
cancelled and gone on with. Knows nothing of names that are no Hub names. huggingface_hub is imported where it is used.

    small files, then what lies beside the shards (MTP layer, vision tower), then the shards: a snapshot that has all
    of those lacks nothing else
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_qwen35.blocks.config import BlockConfig, is_block_drafter
from mlx_qwen35.checkpoint.beside import mtp_files, tower_file
from mlx_qwen35.checkpoint.contents import read_config
from mlx_qwen35.checkpoint.files import INDEX, gaps, indexed_files, main_files
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf, is_variant, models_among
from mlx_qwen35.checkpoint.gguf.opened import open_model
from mlx_qwen35.checkpoint.mtp import DRAFTER, drafter_config, mtp_bytes
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub_cache, hub_gguf
from mlx_qwen35.library.hub_gguf import Headers
from mlx_qwen35.library.hub_progress import Bar, Progress, Watch, reporting
from mlx_qwen35.machine.files import is_litter

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Offer:
    """What the Hub has under a name: a model of this family, or a drafter for one.

    config: of the model, or of the one that a head is for; None: `blocks` is that of a block drafter.
    files: all, name -> bytes, or those of the GGUF that is meant. revision: as it was given, where it is one. headers:
    of a GGUF; None: it is none.
    """

    name: str
    commit: str
    config: ModelConfig | None
    files: dict[str, int]
    is_drafter: bool = False
    revision: str | None = None
    headers: Headers | None = None
    blocks: BlockConfig | None = None

    @property
    def gguf(self) -> Path | None:
        """The model with its headers and nothing behind them; None where it is no GGUF."""
        return None if self.headers is None else self.headers.folder / next(iter(self.files))

    def small_files(self) -> Path:
        """Where all but the weights is, which are left where they are: enough for a Processor."""
        if self.gguf is not None:
            return self.gguf
        cache = hub_cache.cache_folder()
        with _clear_errors(self.name, self.commit):
            paths = {name: _fetch(self.name, name, self.commit, cache) for name in _small(self.files)}
        return paths["config.json"].parent


class NotOnHub(CheckpointError):
    """The Hub has no repository of that name, or none that it shows."""


def look(name: str, revision: str | None = None, wanted: str | None = None) -> Offer:
    """What a download would bring; leaves nothing on the disk.

    wanted: which GGUF of several, by its name or quantization. A revision that is none may be one, too.

    Raises CheckpointError if the network is forbidden or fails, if there is no such repository or revision, and if what
    is there is not a model of this family.
    """
    if hub_cache.is_offline():
        raise CheckpointError(
            f"{name} is not on this machine, and HF_HUB_OFFLINE forbids downloads: unset it, or copy the model here"
        )
    with _clear_errors(name, revision):
        import huggingface_hub

        api = huggingface_hub.HfApi(endpoint=_endpoint())
        try:
            info = api.model_info(name, revision=revision, files_metadata=True)
        except huggingface_hub.errors.RevisionNotFoundError:
            if wanted is not None or not is_variant(revision or ""):
                raise
            revision, wanted = None, revision
            info = api.model_info(name, files_metadata=True)
        sizes = _sizes(info)
        where = f"{name} on the Hugging Face Hub"
        plain = INDEX in sizes or bool(main_files(sizes))
        if wanted is not None or (not plain and models_among(map(Path, sizes))):
            return _gguf_offer(name, info.sha, revision, hub_gguf.chosen(sizes, wanted, name))
        if "config.json" not in sizes:
            raise CheckpointError(f"{where} holds no checkpoint: give a name whose files are safetensors or GGUF")
        with tempfile.TemporaryDirectory() as folder:
            path = _fetch(name, "config.json", info.sha, Path(folder))
            raw, said = _parsed(path, where), f"config.json of {where}"
            blocks = BlockConfig.from_dict(raw, said) if is_block_drafter(raw) else None
            drafts = isinstance(raw, dict) and raw.get("model_type") == DRAFTER
            config = None
            if blocks is None:
                config = drafter_config(raw, said) if drafts else ModelConfig.from_dict(raw, where=said)
    if not plain:
        raise CheckpointError(f"{where} holds no model*.safetensors: give a name whose files are safetensors")
    return Offer(name, info.sha, config, sizes, drafts or blocks is not None, revision, blocks=blocks)


def _gguf_offer(name: str, commit: str, revision: str | None, files: dict[str, int]) -> Offer:
    headers = Headers(files, lambda file, count: _start(name, file, commit, count))
    try:
        config = open_model(headers.folder / next(iter(files))).config
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(headers.folder), f"{name} on the Hugging Face Hub, ")) from None
    return Offer(name, commit, config, files, revision=revision, headers=headers)


def complete_head(folder: Path, on_progress: Progress | None = None) -> None:
    """Bring the file of the MTP layer into a snapshot of the cache that was downloaded without it.

    Does nothing where the layer is there, where the Hub has none or cannot be asked, and where the folder is no
    snapshot. Raises CheckpointError as `download`.
    """
    at = hub_cache.snapshot_of(folder)
    if at is None or hub_cache.is_offline() or mtp_bytes(open_source(folder)):
        return
    name, commit, inside = at
    try:
        with _clear_errors(name, commit):
            import huggingface_hub

            api = huggingface_hub.HfApi(endpoint=_endpoint())
            sizes = _sizes(api.model_info(name, revision=commit, files_metadata=True))
    except CheckpointError:
        return
    heads = hub_gguf.head_for(sizes, inside) if is_gguf(folder) else _head_files(read_config(folder).raw, sizes)
    found = {n: sizes[n] for n in heads}
    _check_space(hub_cache.cache_folder(), sum(found.values()), name)
    watch = Watch(sum(found.values()), on_progress) if on_progress and found else None
    with _clear_errors(name, commit, watch):
        for file, size in found.items():
            _fetch(name, file, commit, hub_cache.cache_folder(), watch)
            if watch:
                watch.end(size)


def _sizes(info: Any) -> dict[str, int]:
    found = [file for file in info.siblings or () if not any(map(is_litter, file.rfilename.split("/")))]
    return {file.rfilename: file.size or 0 for file in found}


def _needed(offer: Offer) -> dict[str, int]:
    """Of what the Hub has, what a checkpoint needs, in order; raises CheckpointError where some of it is not there."""
    sizes, where = offer.files, f"{offer.name} on the Hugging Face Hub"
    if offer.headers is not None:
        return dict(reversed(sizes.items()))  # the tower first
    if INDEX in sizes:
        with tempfile.TemporaryDirectory() as folder:
            index = _fetch(offer.name, INDEX, offer.commit, Path(folder)).read_bytes()
        shards = indexed_files(index, Path(f"{INDEX} of {where}"))
        missing, named = [n for n in shards if n not in sizes], f"its {INDEX} names"
    else:
        shards = main_files(sizes)
        missing, named = gaps(shards), "their numbers call for"
    if missing:
        raise CheckpointError(
            f"{where} lacks {', '.join(missing[:3])}, which {named}: the publisher's upload is not complete, choose "
            "another"
        )
    beside = [] if offer.config is None else [n for n in _beside(offer.config.raw, sizes) if n not in shards]
    return {n: sizes[n] for n in [*_small(sizes), *beside, *shards]}


def _small(sizes: Mapping[str, int]) -> list[str]:
    return sorted(n for n in sizes if any(fnmatchcase(n, pattern) for pattern in _SMALL) and "/" not in n)


def _beside(raw: Any, sizes: Mapping[str, int]) -> list[str]:
    """What lies beside the shards and belongs to the model: its MTP layer and its vision tower."""
    tower = tower_file(raw, sizes) if raw.get("vision_config") else None
    return [*_head_files(raw, sizes), *([tower] if tower else [])]


def _head_files(raw: Any, sizes: Mapping[str, int]) -> list[str]:
    head = mtp_files(raw, sizes)[:1]
    configs = [f"{Path(n).parent.as_posix()}/config.json" for n in head if "/" in n]
    return [*(n for n in configs if n in sizes), *head]


def download(
    name: str,
    revision: str | None = None,
    on_progress: Progress | None = None,
    check: Callable[[Offer], None] | None = None,
    wanted: str | None = None,
) -> Path:
    """Bring what is missing of a checkpoint into the cache, and return its snapshot, or the first file of its GGUF.

    on_progress: called with (bytes here, bytes in all); None shows one bar for all files. What it raises, or
    Ctrl-C, ends the download: files that were complete are kept and not fetched again, the others leave nothing.
    check: called with what there is before a file of it is fetched; what it raises ends the download too. wanted: as in
    `look`.
    Raises CheckpointError as `look`, for an upload that is not complete, and for a full disk.
    """
    offer = look(name, revision, wanted)
    revision = offer.revision
    if check is not None:
        check(offer)
    with _clear_errors(name, revision):
        files = _needed(offer)
    cache = hub_cache.cache_folder()
    present = hub_cache.snapshot(name, offer.commit)
    absent = [n for n in files if present is None or not (present / n).exists()]
    _check_space(cache, sum(files[n] for n in absent), name)
    with reporting(on_progress, name) as report:
        watch = Watch(sum(files.values()), report)
        with _clear_errors(name, revision, watch):
            # By its name first, which writes down what the name means; then by commit: all files belong together.
            named = next(iter(files)) if offer.headers else "config.json"
            path = _fetch(name, named, revision, cache, watch if offer.headers else None)
            snapshot = path.parents[named.count("/")]
            for file, size in files.items():
                _fetch(name, file, snapshot.name, cache, watch)
                watch.end(size)
    return snapshot / next(iter(offer.files)) if offer.headers else snapshot


def _start(name: str, file: str, commit: str, count: int) -> bytes:
    """The first bytes of a file on the Hub."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(name, file, revision=commit, endpoint=_endpoint())
    headers = {**build_hf_headers(), "Range": f"bytes=0-{count - 1}", "Accept-Encoding": "identity"}
    made = bytearray()
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=30) as answer:
        hf_raise_for_status(answer)
        for piece in answer.iter_bytes():
            made += piece
            if len(made) >= count:  # whoever sends all of it is not heard to the end
                break
    return bytes(made[:count])


def _fetch(name: str, file: str, revision: str | None, cache: Path, watch: Watch | None = None) -> Path:
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            name,
            file,
            revision=revision,
            cache_dir=cache,
            endpoint=_endpoint(),
            tqdm_class=watch.bar if watch else Bar,
        )
    finally:
        if watch and watch.raised is not None:
            raise watch.raised from None
    return Path(path)


@contextmanager
def _clear_errors(name: str, revision: str | None, watch: Watch | None = None) -> Iterator[None]:
    """Says in words what huggingface_hub raises; what a callback raised goes through as it is."""
    from huggingface_hub import errors

    where = f"{name} on the Hugging Face Hub"
    try:
        yield
    except errors.GatedRepoError:
        raise CheckpointError(f"{where} is gated: accept its terms there, and run `hf auth login`") from None
    except errors.RevisionNotFoundError:
        raise CheckpointError(
            f"{where} has no revision {revision!r}: give a branch, tag or commit that it has, or leave it out"
        ) from None
    except errors.RepositoryNotFoundError:
        raise NotOnHub(
            f"{name} is neither on this machine nor on the Hugging Face Hub: check the name; if the model is private, "
            "run `hf auth login`"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:
        if watch and watch.raised is error:
            raise
        # httpx's, requests' or the file system's, by the version of huggingface_hub
        said = str(error).partition("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{where} cannot be downloaded ({said:.300}): check the network and try again; what is complete is kept. "
            f"If a folder or a file is meant, there is none at {name}"
        ) from error


def _parsed(path: Path, where: str) -> Any:
    import json

    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"config.json of {where} is not valid JSON ({error}): choose another") from None


def _check_space(cache: Path, needed: int, name: str) -> None:
    there = next(p for p in (cache, *cache.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise CheckpointError(
            f"{there} has {free / 1e9:.1f} GB free and the download of {name} needs {needed / 1e9:.1f} GB: free some "
            "space, choose a smaller model, or let HF_HUB_CACHE name a folder on another disk"
        )


def _endpoint() -> str | None:
    return (os.environ.get("HF_ENDPOINT") or "").rstrip("/") or None
