"""Where LM Studio keeps its models, and what it calls them.

Knows LM Studio's home, its models folder <home>/models/<publisher>/<model>/, exactly two levels, and its catalogue
<home>/hub/models/<publisher>/<model>/model.yaml: a key such as qwen/qwen3.5-35b-a3b that stands for several downloads
of one model, told apart as qwen/qwen3.5-35b-a3b@4bit. Knows nothing of what weights hold, and changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_qwen35.library.stored import Stored, each_model, expanded, read_json, subfolders

PLACE = "LM Studio"
_MOST_HOPS = 4  # from one virtual model to the next


def home() -> Path:
    """LM Studio's folder, whether or not it is there: ~/.lmstudio-home-pointer names it, or it is one of the two."""
    user = Path.home()
    try:
        pointed = (user / ".lmstudio-home-pointer").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        pointed = ""
    if pointed:
        return expanded(pointed)
    old = user / ".cache" / "lm-studio"
    return old if old.is_dir() else user / ".lmstudio"


def models_folder() -> Path:
    """The folder of <publisher>/<model>/, whether or not it is there; `downloadsFolder` in settings.json moves it."""
    folder = home()
    moved = read_json(folder / "settings.json").get("downloadsFolder")
    return expanded(moved) if isinstance(moved, str) and moved.strip() else folder / "models"


def models() -> list[Stored]:
    """Every <publisher>/<model>/ in the models folder, whatever lies in it; of several GGUFs in one each."""
    return [
        stored
        for publisher in subfolders(models_folder())
        for model in subfolders(publisher)
        for stored in each_model(Stored(f"{publisher.name}/{model.name}", model, PLACE))
    ]


def virtual_models() -> dict[str, list[str]]:
    """The keys of the catalogue, and for each the "publisher/model" of the downloads that it stands for."""
    found = {
        f"{publisher.name}/{model.name}": _base(model / "model.yaml")
        for publisher in subfolders(home() / "hub" / "models")
        for model in subfolders(publisher)
        if (model / "model.yaml").is_file()
    }
    return {key: list(dict.fromkeys(_downloads(key, found))) for key in found}


def _base(path: Path) -> list[Any]:
    """What a model.yaml is made from: the key of another model, or a list of downloads; [] where it cannot be told."""
    import yaml

    try:
        described = yaml.safe_load(path.read_bytes())
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return []
    base = described.get("base") if isinstance(described, dict) else None
    return base if isinstance(base, list) else [base]


def _downloads(key: str, bases: dict[str, list[Any]], hops: int = 0) -> Iterator[str]:
    for base in bases[key]:
        if isinstance(base, str):
            if base in bases and hops < _MOST_HOPS:
                yield from _downloads(base, bases, hops + 1)
            else:
                yield base
        elif isinstance(base, dict):
            sources = base.get("sources")
            for source in sources if isinstance(sources, list) else ():
                if isinstance(source, dict) and source.get("user") and source.get("repo"):
                    yield f"{source['user']}/{source['repo']}"
            if isinstance(base.get("key"), str):
                yield base["key"]
