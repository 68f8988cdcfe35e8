"""From a name to a folder.

Knows in which order a name is looked up: a folder, LM Studio's models, the Hugging Face cache, the Hugging Face Hub;
and what to say where it fits several models or none. Knows nothing of what weights hold.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import mlx_qwen35
from mlx_qwen35.checkpoint.blocks import is_blocks, read_blocks_config
from mlx_qwen35.checkpoint.contents import read_config
from mlx_qwen35.checkpoint.files import missing_shards
from mlx_qwen35.checkpoint.gguf.choosing import is_gguf, missing_files, models_in
from mlx_qwen35.checkpoint.gguf.container import first_file, named_files
from mlx_qwen35.checkpoint.mtp import is_drafter
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import hub_cache, lmstudio
from mlx_qwen35.library.stored import Stored, expanded, subfolders
from mlx_qwen35.library.suggesting import PUBLISHED, alike

if TYPE_CHECKING:
    from mlx_qwen35.library.hub import Offer

DEMO = "demo"
# A model's page, as it is copied from a browser.
_PAGE = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/|hf://)(?P<name>[\w.-]+/[\w.-]+)(?P<wanted>:[\w.-]+)?"
    r"(?:/(?:(?:tree|blob|resolve)/(?:main|(?P<at>[\w.-]+))(?:(?P<file>/[^?#]+\.gguf)|/[^?#]*)?)?)?(?:[?#].*)?"
)
_NAME = re.compile(
    r"(?P<name>[\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@(?P<at>[\w.][\w./-]*))?(?::(?P<wanted>[\w][\w.-]*))?"
)
_FILE = re.compile(r"(?P<name>[\w-][\w.-]*/[\w-][\w.-]*)(?:@(?P<at>[\w.][\w.-]*))?/(?P<wanted>[\w][^:\0]*\.gguf)", re.I)


@dataclass(frozen=True)
class HubName:
    """A name that only the Hub may know, or of which not all files are here yet. wanted: which GGUF, by its name or
    quantization."""

    name: str
    revision: str | None
    wanted: str | None = None

    def __str__(self) -> str:
        return self.name + (f"@{self.revision}" if self.revision else "") + (f":{self.wanted}" if self.wanted else "")


def find(
    ref: str | Path | None,
    *,
    on_progress: Callable[[int, int], None] | None = None,
    check: Callable[[Offer], None] | None = None,
) -> Path:
    """The folder, or the GGUF, that `ref` names, downloaded if it has to be.

    ref: None or "demo", the checkpoint inside the package; a folder, or a .gguf file; what LM Studio calls a model
    (`publisher/model`, `model`, and behind either `@4bit`, `@q4_k_m` or another variant); or a name of the Hugging Face
    Hub (`publisher/model`, and behind it `@` and a branch, tag or commit), first as the cache on this disk has it, then
    from the network, which GGUFs are not downloaded from.
    on_progress: called with (bytes here, bytes in all) where something is downloaded. check: called before that, with
    what would be downloaded; what it raises ends it.
    Raises CheckpointError where `ref` names nothing, several models, or one that is not whole or not of this family.
    """
    found = look_up(ref)
    if isinstance(found, Stored):
        return found.folder
    from mlx_qwen35.library import hub  # what is here already needs none of it

    try:
        return hub.download(found.name, found.revision, on_progress, check, found.wanted)
    except hub.NotOnHub as error:
        raise CheckpointError(f"{error}. {_near_misses(found.name)}") from None


def look_up(ref: str | Path | None) -> Stored | HubName:
    """The same without the network. Raises CheckpointError also where HF_HUB_OFFLINE forbids what is left to do."""
    if ref is None or (isinstance(ref, str) and ref.strip() == DEMO):
        return Stored(DEMO, demo_folder(), "the package")
    if isinstance(ref, str):
        page = _PAGE.fullmatch(ref.strip())
        named = page and f"{page['name']}{'@' if page['at'] else ''}{page['at'] or ''}"
        ref = f"{named}{page['file'] or page['wanted'] or ''}" if page else ref.strip()
    elif not isinstance(ref, os.PathLike):
        raise CheckpointError(f"{ref!r} is no name of a model: give a text or a Path")
    if not str(ref):
        raise CheckpointError("the name of the model is empty: give a folder or a name (`mlx-qwen35 ls`), or demo")
    folder = expanded(ref)
    if os.path.isdir(folder):
        return Stored(str(ref), _checkpoint_in(folder), "folder")
    if os.path.isfile(folder):
        return Stored(str(ref), _folder_of(folder), "folder")
    if isinstance(ref, str) and not ref.startswith((".", "/", "~")):
        ref = ref.rstrip("/")
    named = (_NAME.fullmatch(ref) or _FILE.fullmatch(ref)) if isinstance(ref, str) else None
    if named is None:
        by_name = isinstance(ref, str) and not ref.startswith((".", "~")) and "/" not in ref
        near = _near_misses(ref) if by_name else _near_folders(ref)
        raise CheckpointError(f"{ref} is no folder on this machine. {near}")
    name, at, wanted = named["name"], named["at"], named["wanted"]
    candidates = _in_lmstudio(name, wanted or at)
    if not candidates and "/" not in name:
        candidates = _named(name, wanted or at, hub_cache.models())
    if candidates:
        return _only(candidates, ref)
    if "/" not in name:
        raise CheckpointError(f"no model on this machine is called {ref}. {_near_misses(ref)}")
    if chosen := _cached_gguf(name, at, wanted):
        if not any(missing_files(stored.folder) for stored in chosen):
            return _only(chosen, ref)
        if hub_cache.is_offline():
            raise CheckpointError(f"{ref} is incomplete, and HF_HUB_OFFLINE forbids downloading the rest: unset it")
        return HubName(name, at, wanted)
    if wanted is not None and hub_cache.is_offline():
        raise CheckpointError(f"{ref} is not on this machine, and HF_HUB_OFFLINE forbids looking it up: unset it")
    if wanted is not None:
        return HubName(name, at, wanted)
    snapshot = hub_cache.snapshot(name, at)
    if snapshot is not None and not _lacks(snapshot):
        stored = Stored(ref, snapshot, hub_cache.PLACE)
        if trouble := _trouble(stored):
            raise CheckpointError(trouble)
        return stored
    if hub_cache.is_offline():
        if snapshot is not None:
            raise CheckpointError(
                f"{ref}: {_lacks(snapshot)}, and HF_HUB_OFFLINE forbids downloading the rest: unset it"
            )
        raise CheckpointError(
            f"{ref} is not on this machine, and HF_HUB_OFFLINE forbids looking it up. {_near_misses(ref)}"
        )
    return HubName(name, at)


def demo_folder() -> Path:
    """The checkpoint inside the package; raises CheckpointError if this installation was built without it."""
    folder = Path(mlx_qwen35.__file__).parent / "demo"
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder} holds no demo checkpoint: install the package again, or give a folder")
    return folder


def _in_lmstudio(name: str, variant: str | None) -> list[Stored]:
    """What LM Studio may mean by a name; its own keys are written in lower case and matched so."""
    models = lmstudio.models()
    if variant is None and "/" in name:
        exact = [stored for stored in models if stored.name.lower() == name.lower()]
        if exact:
            return exact
    keys = lmstudio.virtual_models()
    bases = {base.lower() for key, of in keys.items() if name in (key, key.rpartition("/")[2]) for base in of}
    virtual = [stored for stored in models if stored.name.lower() in bases]
    if virtual:
        return _with_variant(virtual, variant, name.rpartition("/")[2])
    if "/" in name and name in keys:
        raise CheckpointError(
            f"{name} is in LM Studio's catalogue, but none of its downloads is in {lmstudio.models_folder()}: download "
            "an MLX variant of it in LM Studio"
        )
    return _named(name, variant, models)


def _named(name: str, variant: str | None, models: list[Stored]) -> list[Stored]:
    """The models of that name, or, where there are none, those that a quantization in their name sets apart.

    Where none is of that variant: an error, or none, if with its publisher it may be a revision on the Hub.
    """
    publisher, _, model = name.lower().rpartition("/")
    models = [s for s in models if not publisher or s.name.lower().startswith(publisher + "/")]
    if variant is None:
        exact = [stored for stored in models if stored.model.lower() == model]
        if exact or publisher:
            return exact
    return _with_variant([s for s in models if model in {*s.stems, s.model.lower()}], variant, name)


def _with_variant(models: list[Stored], variant: str | None, name: str) -> list[Stored]:
    if variant is None or not models:
        return models
    found = [s for s in models if variant.lower() in {*s.variants, s.folder.name.lower()}]
    if not found and "/" not in name:
        raise CheckpointError(f"{name} is not here as @{variant}. Here are:{_listed(models)}")
    return found


def _cached_gguf(name: str, at: str | None, wanted: str | None) -> list[Stored]:
    """The GGUFs of a repository in the Hub's cache that may be meant, whole or not.

    at: a revision, or a quantization; wanted: a file's name, or a quantization.
    """
    found = []
    here = hub_cache.models()
    # Beside safetensors, a GGUF is what was asked for by name.
    more = [replace(s, folder=file) for s in here if wanted and not s.is_gguf for file in models_in(s.folder)]
    for stored in [*here, *more]:
        inside = hub_cache.snapshot_of(stored.folder) if stored.is_gguf else None
        if inside is None or inside[0].lower() != name.lower():
            continue
        marks = {*stored.name.lower().split("@")[1:]} - stored.variants
        files = {file.as_posix().lower() for file in named_files(Path(inside[2]))}
        words = {*(marks or {hub_cache.DEFAULT_REVISION}), inside[1], *stored.variants, *files}
        words |= {file.rpartition("/")[2] for file in files}
        if all(word is None or word.lower() in words for word in (at, wanted)):
            found.append(stored)
    return found


def _only(candidates: list[Stored], ref: str) -> Stored:
    """The one that can be loaded; raises CheckpointError where none or several can."""
    troubles = {stored: _trouble(stored) for stored in candidates}
    good = [stored for stored, trouble in troubles.items() if trouble is None]
    if len(good) == 1:
        return good[0]
    if good:
        raise CheckpointError(f"{ref} matches {len(good)} models: give one of these names{_listed(good)}")
    if len(candidates) == 1:
        raise CheckpointError(troubles[candidates[0]])
    raise CheckpointError(f"{ref} names no model that can be loaded:" + "".join(f"\n  {t}" for t in troubles.values()))


def _trouble(stored: Stored) -> str | None:
    """Why a model cannot be loaded, as far as names and config.json tell; None: nothing is in the way."""
    where = f"{stored.name} ({stored.place}, {stored.folder})"
    try:
        if is_blocks(stored.folder):
            read_blocks_config(stored.folder)
        elif not is_drafter(stored.folder):
            read_config(stored.folder)
        lacks = None if stored.is_gguf else _lacks(stored.folder)
    except CheckpointError as error:
        return f"{stored.name} ({stored.place}): {error}"
    return f"{where}: {lacks}: finish the download" if lacks else None


def _lacks(folder: Path) -> str | None:
    """Which files a download has not brought yet, in words."""
    if not (folder / "config.json").exists():
        return "config.json is missing"
    missing = missing_shards(folder)
    if not missing:
        return None
    more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
    return f"{', '.join(missing[:3])}{more} {'is' if len(missing) == 1 else 'are'} missing"


def _listed(models: Iterable[Stored]) -> str:
    models = list(models)
    wide = max(len(stored.name) for stored in models)
    return "".join(f"\n  {s.name:{wide}}  {s.variant}, {s.place}" for s in models)


def _near_misses(ref: str) -> str:
    """Names like this one among what lies here, or else among those of the Hub, and what to do."""
    stored = [s.name for s in [*lmstudio.models(), *hub_cache.models()]]
    if names := alike(ref, [*sorted({*stored, *lmstudio.virtual_models()}), DEMO]):
        return f"Did you mean {' or '.join(names)}? `mlx-qwen35 ls` lists what is here"
    names = [] if hub_cache.is_offline() else alike(ref, PUBLISHED)
    if names := [name for name in names if name.lower() != ref.lower()]:
        return f"On the Hugging Face Hub there is {' and '.join(names)}: give that name, and it is downloaded"
    return "`mlx-qwen35 ls` lists what is here; from the Hugging Face Hub give PUBLISHER/MODEL"


def _near_folders(ref: str | Path) -> str:
    """Folders beside one that is not there, with a name like its own, and what to do."""
    from difflib import get_close_matches

    folder = expanded(ref)
    near = get_close_matches(folder.name, [path.name for path in subfolders(folder.parent)], n=3, cutoff=0.7)
    meant = f"Did you mean {' or '.join(str(folder.parent / name) for name in near)}? " if near else ""
    return f"{meant}Check the path, or give a name (`mlx-qwen35 ls`)"


def _folder_of(file: Path) -> Path:
    """The checkpoint that a file is one of, a GGUF by itself; raises CheckpointError where it is none."""
    if is_gguf(file):
        return first_file(file)
    if file.suffix in (".safetensors", ".json", ".jinja") and (file.parent / "config.json").is_file():
        return file.parent
    raise CheckpointError(f"{file} is a file: give the folder that holds config.json and the weights")


def _checkpoint_in(folder: Path) -> Path:
    """The folder itself, or what is meant by it: a snapshot in the cache of the Hub is three folders further down."""
    if (folder / "config.json").exists():
        return folder
    snapshots = [path for path in subfolders(folder / "snapshots") if (path / "config.json").exists()]
    return snapshots[0] if len(snapshots) == 1 else folder
