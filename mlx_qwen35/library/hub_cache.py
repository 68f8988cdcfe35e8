"""The cache of the Hugging Face Hub on this disk.

Knows its layout, models--<publisher>--<model>/{refs,snapshots}, and the variables that move it. Knows no network and
nothing of what weights hold; huggingface_hub itself is not imported.
"""

from __future__ import annotations

import os
from pathlib import Path

from mlx_qwen35.library.stored import Stored, each_model, expanded, subfolders
from mlx_qwen35.machine.files import listed

PLACE = "Hugging Face cache"
DEFAULT_REVISION = "main"
_PREFIX = "models--"
_SHORTEST_COMMIT = 7


def cache_folder() -> Path:
    """HF_HUB_CACHE, or hub/ in HF_HOME, or ~/.cache/huggingface/hub; whether or not it is there."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"):
        if os.environ.get(name):
            return _expanded(os.environ[name])
    if os.environ.get("HF_HOME"):
        return _expanded(os.environ["HF_HOME"]) / "hub"
    caches = _expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return caches / "huggingface" / "hub"


def models() -> list[Stored]:
    """Every snapshot, whole or not: the one that `main` means as "publisher/model", others as "...@revision".

    Of several GGUFs in one each is a model by itself, as stored.each_model() calls them.
    """
    found = []
    for repository in subfolders(cache_folder()):
        name = repository.name.removeprefix(_PREFIX).replace("--", "/", 1)
        if repository.name == name:
            continue
        refs = {commit: revision for revision, commit in reversed(_refs(repository).items())}
        folders = list(subfolders(repository / "snapshots"))
        for folder in folders:
            revision = refs.get(folder.name, folder.name[:8])
            plain = revision == DEFAULT_REVISION or (len(folders) == 1 and DEFAULT_REVISION not in refs.values())
            found += each_model(Stored(name if plain else f"{name}@{revision}", folder, PLACE))
    return found


def snapshot(name: str, revision: str | None = None) -> Path | None:
    """The snapshot of a "publisher/model" at a branch, tag or commit (None: main, or the only one); None: not here.

    Publisher and model are matched as the Hub does, without regard to case. The snapshot may lack files.
    """
    wanted = (_PREFIX + name.replace("/", "--")).lower()
    for repository in subfolders(cache_folder()):
        if repository.name.lower() != wanted:
            continue
        folders = {folder.name: folder for folder in subfolders(repository / "snapshots")}
        commit = _refs(repository).get(revision or DEFAULT_REVISION)
        if commit in folders:
            return folders[commit]
        if revision is None:
            return next(iter(folders.values())) if len(folders) == 1 else None
        if len(revision) >= _SHORTEST_COMMIT:
            begun = [folder for found, folder in folders.items() if found.startswith(revision.lower())]
            return begun[0] if len(begun) == 1 else None
    return None


def snapshot_of(path: Path) -> tuple[str, str, str] | None:
    """("publisher/model", commit, its name inside) of a snapshot in this cache or a file in one; None: of neither."""
    for folder in (path, *path.parents[:2]):
        snapshots, repository = folder.parent, folder.parent.parent
        here = snapshots.name == "snapshots" and repository.name.startswith(_PREFIX)
        if here and repository.parent.resolve() == cache_folder().resolve():
            name = repository.name.removeprefix(_PREFIX).replace("--", "/", 1)
            return name, folder.name, path.relative_to(folder).as_posix()
    return None


def is_offline() -> bool:
    """Whether HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) forbids the network."""
    said = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE") or ""
    return said.upper() in ("1", "ON", "YES", "TRUE")


def _refs(repository: Path) -> dict[str, str]:
    """Revision -> commit; main first."""
    root, found = repository / "refs", {}
    for path in listed(root, "**/*"):
        try:
            found[path.relative_to(root).as_posix()] = path.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError):
            continue
    return dict(sorted(found.items(), key=lambda item: item[0] != DEFAULT_REVISION))


def _expanded(path: str) -> Path:
    return expanded(os.path.expandvars(path))
