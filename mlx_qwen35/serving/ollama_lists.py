"""What Ollama's clients ask of a server beside answers: /api/tags, /api/show, /api/ps, /api/version.

Knows Ollama's words for a model. Knows of models what the catalogue says, and none of their files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from typing import Any

from mlx_qwen35.serving.catalogue import Catalogue, Listed, Question, found
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal

VERSION = "0.20.0"  # of the interface that is spoken; clients ask for 0.6.4 or more, three numbers and nothing else


def refused(refusal: Refusal) -> dict[str, Any]:
    """The JSON of an error."""
    return {"error": refusal.message}


def questions(catalogue: Catalogue) -> list[Question]:
    """The routes that no model answers."""

    async def tags(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"models": [_listed(each) for each in catalogue.models()]}

    async def ps(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"models": [_running(each) for each in catalogue.models() if each.loaded]}

    async def show(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        fields = Fields(body)
        name = fields.text("model") or fields.text("name")
        if not name:
            raise Refusal("invalid", "model is missing: name one of /api/tags", "model")
        return _shown(found(catalogue, name))

    async def version(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"version": VERSION}

    async def not_here(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        raise Refusal(
            "invalid", "this server neither downloads nor changes models: run `mlx-qwen35 ls` and `mlx-qwen35 convert`"
        )

    async def embed(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        raise Refusal("invalid", "this model answers and makes no embeddings: use another server for them")

    return [
        Question("GET", "/api/tags", tags, refused),
        Question("GET", "/api/ps", ps, refused),
        Question("POST", "/api/show", show, refused),
        Question("GET", "/api/version", version, refused),
        *(Question("POST", f"/api/{name}", not_here, refused) for name in ("pull", "push", "create", "copy")),
        Question("DELETE", "/api/delete", not_here, refused),
        *(Question("POST", f"/api/{name}", embed, refused) for name in ("embed", "embeddings")),
    ]


def _tag(listed: Listed) -> str:
    return listed.name if ":" in listed.name.rpartition("/")[2] else f"{listed.name}:latest"


def _digest(listed: Listed) -> str:
    """Which model it is, and no digest of its files, which would take minutes."""
    return hashlib.sha256(f"{listed.stored.folder}\n{listed.stored.nbytes}".encode()).hexdigest()


def _family(listed: Listed) -> str:
    return "qwen35moe" if listed.stored.architecture == "moe" else "qwen35"


def _details(listed: Listed) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "gguf" if (listed.stored.quantization or "").startswith("gguf ") else "safetensors",
        "family": _family(listed),
        "families": [_family(listed)],
        "parameter_size": listed.size or "",
        "quantization_level": (listed.stored.quantization or "").removeprefix("gguf "),
    }


def _listed(listed: Listed) -> dict[str, Any]:
    try:
        changed = listed.stored.folder.stat().st_mtime
    except OSError:
        changed = 0.0
    tag = _tag(listed)
    return {
        "name": tag,
        "model": tag,
        "modified_at": when(changed),
        "size": listed.stored.nbytes,
        "digest": _digest(listed),
        "details": _details(listed),
    }


def _running(listed: Listed) -> dict[str, Any]:
    used = listed.used or listed.since or 0.0
    for_ever = listed.ttl is None or math.isinf(listed.ttl)
    return {
        "name": _tag(listed),
        "model": _tag(listed),
        "size": listed.nbytes,
        "digest": _digest(listed),
        "details": _details(listed),
        "expires_at": "2318-01-01T00:00:00Z" if for_ever else when(used + listed.ttl),
        "size_vram": listed.nbytes,
        "context_length": listed.context_length or listed.stored.context_length or 0,
    }


def _shown(listed: Listed) -> dict[str, Any]:
    stored, family = listed.stored, _family(listed)
    can = ["completion", "tools", "thinking", *(["vision"] if stored.vision else [])]
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": _listed(listed)["modified_at"],
        "details": _details(listed),
        "model_info": {
            "general.architecture": family,
            "general.basename": listed.name.rpartition("/")[2],
            "general.parameter_count": stored.parameters or 0,
            f"{family}.context_length": listed.context_length or stored.context_length or 0,
        },
        "capabilities": can,
    }


def when(seconds: float) -> str:
    """Seconds since 1970 as Ollama writes a time."""
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="microseconds").replace("+00:00", "Z")
