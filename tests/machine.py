"""A faked machine for tests: a home with LM Studio's folders and a Hugging Face cache, filled with tiny checkpoints.

Knows both layouts as their programs write them. Knows nothing of how names are looked up.
"""

import json
from pathlib import Path
from typing import Any

from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
OTHER_COMMIT = "fedcba9876543210fedcba9876543210fedcba98"
_VARIABLES = (
    "HF_HOME",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "XDG_CACHE_HOME",
    "HF_HUB_OFFLINE",
    "HF_ENDPOINT",
    "TRANSFORMERS_OFFLINE",
)


class Machine:
    """home: its user's folder. Nothing lies in it at first, and nothing outside of it is seen."""

    def __init__(self, home: Path, monkeypatch: Any) -> None:
        self.home = home
        home.mkdir(exist_ok=True)
        self.monkeypatch = monkeypatch
        monkeypatch.setenv("HOME", str(home))
        for name in _VARIABLES:
            monkeypatch.delenv(name, raising=False)

    def lmstudio(self, name: str, *, root: Path | None = None, **config: Any) -> Path:
        """publisher/model among LM Studio's downloads; root: of its models folder."""
        return checkpoint((root or self.home / ".lmstudio" / "models") / name, **config)

    def catalogue(self, key: str, text: str) -> Path:
        """A model.yaml in LM Studio's catalogue."""
        path = self.home / ".lmstudio" / "hub" / "models" / key / "model.yaml"
        path.parent.mkdir(parents=True)
        path.write_text(text)
        return path

    def cached(
        self, name: str, *, commit: str = COMMIT, revision: str | None = "main", root: Path | None = None, **config: Any
    ) -> Path:
        """A snapshot in the Hugging Face cache, its files links into blobs as the Hub's own program makes them."""
        cache = root or self.home / ".cache" / "huggingface" / "hub"
        repository = cache / ("models--" + name.replace("/", "--"))
        snapshot = checkpoint(repository / "snapshots" / commit, **config)
        blobs = repository / "blobs"
        blobs.mkdir(exist_ok=True)
        for path in sorted(snapshot.iterdir()):
            blob = blobs / f"{commit[:8]}-{path.name}"
            path.rename(blob)
            path.symlink_to(blob)
        if revision:
            ref = repository / "refs" / revision
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(commit)
        return snapshot


def checkpoint(
    folder: Path, *, kind: str = "dense", bits: int | None = None, text: dict[str, Any] | None = None, **write: Any
) -> Path:
    """A tiny checkpoint; bits: only said in config.json, the tensors are not quantized; text: keys of text_config."""
    config = tiny_config(kind, **(text or {}))
    if bits:
        config["quantization"] = {"bits": bits, "group_size": 64}
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_checkpoint(folder, config, random_tensors(config), **write)


def foreign(folder: Path, model_type: str = "llama") -> Path:
    """A checkpoint of another family, as far as config.json says."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8}))
    (folder / "model.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    return folder


def gguf(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    return folder
