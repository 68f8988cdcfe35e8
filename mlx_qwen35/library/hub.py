"""Downloads from the Hugging Face Hub into its cache.

Knows which files of a repository a checkpoint needs, in which order they may arrive, and how a download is watched,
cancelled and gone on with. Knows nothing of names that are no Hub names. huggingface_hub is imported where it is used.

    small files, then what lies beside the shards (MTP layer, vision tower), then the shards: a snapshot that has all
    of those lacks nothing else
"""

from __future__ import annotations

import _thread
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.beside import mtp_files, tower_file
from mlx_qwen35.checkpoint.files import INDEX, gaps, indexed_files, main_files
from mlx_qwen35.checkpoint.mtp import DRAFTER, drafter_config, mtp_bytes
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub_cache
from mlx_qwen35.machine.files import is_litter

Progress = Callable[[int, int], None]

NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_SMALL = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")


@dataclass(frozen=True)
class Offer:
    """What the Hub has under a name: a model of this family, or a drafter for one. files: all, name -> bytes."""

    name: str
    commit: str
    config: ModelConfig
    files: dict[str, int]
    is_drafter: bool = False

    def small_files(self) -> Path:
        """The folder with all but the weights, which are left where they are: enough for a Processor."""
        cache = hub_cache.cache_folder()
        with _clear_errors(self.name, self.commit):
            paths = {name: _fetch(self.name, name, self.commit, cache) for name in _small(self.files)}
        return paths["config.json"].parent


class NotOnHub(CheckpointError):
    """The Hub has no repository of that name, or none that it shows."""


def look(name: str, revision: str | None = None) -> Offer:
    """What a download would bring; leaves nothing on the disk.

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
        info = api.model_info(name, revision=revision, files_metadata=True)
        sizes = _sizes(info)
        where = f"{name} on the Hugging Face Hub"
        if "config.json" not in sizes:
            if any(n.endswith(".gguf") for n in sizes):
                raise CheckpointError(
                    f"{where} holds GGUF files, of which you choose one: download it (`hf download {name} FILE`, or "
                    "in LM Studio) and give that file; or give a name whose files are safetensors"
                )
            raise CheckpointError(f"{where} holds no checkpoint: give a name whose files are safetensors")
        with tempfile.TemporaryDirectory() as folder:
            path = _fetch(name, "config.json", info.sha, Path(folder))
            raw, said = _parsed(path, where), f"config.json of {where}"
            drafts = isinstance(raw, dict) and raw.get("model_type") == DRAFTER
            config = drafter_config(raw, said) if drafts else ModelConfig.from_dict(raw, where=said)
    if INDEX not in sizes and not main_files(sizes):
        raise CheckpointError(f"{where} holds no model*.safetensors: give a name whose files are safetensors")
    return Offer(name, info.sha, config, sizes, drafts)


def complete_head(folder: Path, on_progress: Progress | None = None) -> None:
    """Bring the file of the MTP layer into a snapshot of the cache that was downloaded without it.

    Does nothing where the layer is there, where the Hub has none or cannot be asked, and where the folder is no
    snapshot. Raises CheckpointError as `download`.
    """
    at = hub_cache.snapshot_of(folder)
    if at is None or hub_cache.is_offline() or mtp_bytes(open_source(folder)):
        return
    name, commit = at
    try:
        with _clear_errors(name, commit):
            import huggingface_hub

            api = huggingface_hub.HfApi(endpoint=_endpoint())
            sizes = _sizes(api.model_info(name, revision=commit, files_metadata=True))
    except CheckpointError:
        return
    found = {n: sizes[n] for n in _head_files(ModelConfig.from_folder(folder).raw, sizes)}
    _check_space(hub_cache.cache_folder(), sum(found.values()), name)
    watch = _Watch(sum(found.values()), on_progress) if on_progress and found else None
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
    beside = [n for n in _beside(offer.config.raw, sizes) if n not in shards]
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
) -> Path:
    """Bring what is missing of a checkpoint into the cache, and return its snapshot.

    on_progress: called with (bytes here, bytes in all); None shows one bar for all files. What it raises, or
    Ctrl-C, ends the download: files that were complete are kept and not fetched again, the others leave nothing.
    check: called with what there is before a file of it is fetched; what it raises ends the download too.
    Raises CheckpointError as `look`, for an upload that is not complete, and for a full disk.
    """
    offer = look(name, revision)
    if check is not None:
        check(offer)
    with _clear_errors(name, revision):
        files = _needed(offer)
    cache = hub_cache.cache_folder()
    present = hub_cache.snapshot(name, offer.commit)
    absent = [n for n in files if present is None or not (present / n).exists()]
    _check_space(cache, sum(files[n] for n in absent), name)
    with _reporting(on_progress, name) as report:
        watch = _Watch(sum(files.values()), report)
        with _clear_errors(name, revision, watch):
            # By its name first, which writes down what the name means; then by commit: all files belong together.
            path = _fetch(name, "config.json", revision, cache)
            commit = path.parent.name
            for file, size in files.items():
                _fetch(name, file, commit, cache, watch)
                watch.end(size)
    return path.parent


def _fetch(name: str, file: str, revision: str | None, cache: Path, watch: _Watch | None = None) -> Path:
    import huggingface_hub

    try:
        path = huggingface_hub.hf_hub_download(
            name,
            file,
            revision=revision,
            cache_dir=cache,
            endpoint=_endpoint(),
            tqdm_class=watch.bar if watch else _Bar,
        )
    finally:
        if watch and watch.raised is not None:
            raise watch.raised from None
    return Path(path)


@contextmanager
def _reporting(on_progress: Progress | None, name: str) -> Iterator[Progress]:
    """What was asked to be called, or a bar of its own."""
    if on_progress is not None:
        yield on_progress
        return
    from huggingface_hub.utils import tqdm  # which HF_HUB_DISABLE_PROGRESS_BARS keeps silent

    with tqdm(desc=name, unit="B", unit_scale=True) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


class _Watch:
    """Counts bytes for a callback, and carries what it raises to the thread that waits for the download."""

    def __init__(self, total: int, report: Progress) -> None:
        self._total, self._report = total, report
        self._done = self._here = 0  # of the files before, of this one
        self._thread = threading.current_thread()
        self._said = 0
        self.raised: BaseException | None = None
        report(0, total)

    def end(self, size: int) -> None:
        """A file of `size` bytes is here, whether it was fetched or had been here before."""
        self._done, self._here = self._done + size, 0
        self._say()

    @property
    def bar(self) -> type[_Bar]:
        """What huggingface_hub takes in place of the class tqdm."""
        return type("_BarOfThis", (_Bar,), {"watch": self})

    def add(self, count: int) -> None:
        self._here += count
        if self.raised is None:
            self._say()

    def _say(self) -> None:
        done = min(self._done + self._here, self._total)
        if done == self._said:  # the last bytes of a file, and its end
            return
        self._said = done
        try:
            self._report(done, self._total)
        except BaseException as error:
            self.raised = error
            if threading.current_thread() is self._thread:
                raise
            # A thread of the downloader would swallow it: interrupt the one that waits, as Ctrl-C does.
            if self._thread is threading.main_thread():
                _thread.interrupt_main()


class _Bar:
    """The part of tqdm that huggingface_hub calls; only `update` says something, and only to a watch."""

    watch: _Watch | None = None
    total: int | None = None
    n = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        pass

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *raised: object) -> None:
        pass

    def update(self, count: float | None = 1) -> None:
        if self.watch is not None:
            self.watch.add(int(count or 0))

    def _nothing(self, *args: Any, **options: Any) -> None:
        pass

    close = refresh = reset = clear = update_transfer = _nothing
    set_description = set_postfix = set_postfix_str = set_transfer_postfix_str = _nothing


@contextmanager
def _clear_errors(name: str, revision: str | None, watch: _Watch | None = None) -> Iterator[None]:
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
            f"{where} cannot be downloaded ({said:.300}): check the network and try again; what is complete is kept"
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
