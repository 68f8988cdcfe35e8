"""LM Studio's lists of models, and loading and unloading: /api/v1/models, /api/v0/models.

Knows its words for a model. Knows of models what the catalogue says.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

from mlx_qwen35.serving.catalogue import Catalogue, Listed, Question, found
from mlx_qwen35.serving.fields import Fields
from mlx_qwen35.serving.refusal import Refusal

_NO_DOWNLOAD = (
    "this server downloads nothing by itself: run `mlx-qwen35 generate --model PUBLISHER/MODEL hello` on its machine, "
    "which fetches the model from the Hugging Face Hub"
)

_TYPES = {
    "not_found": "model_not_found", "busy": "unknown", "unavailable": "unknown", "broken": "internal_error",
}  # fmt: skip
_CODES = {"too_long": "context_length_exceeded", "unauthorized": "invalid_api_key", "busy": "rate_limit_exceeded"}


def refused(refusal: Refusal) -> dict[str, Any]:
    """The JSON of an error."""
    error = {"type": _TYPES.get(refusal.kind, "invalid_request"), "message": refusal.message}
    if refusal.kind in _CODES:
        error["code"] = _CODES[refusal.kind]
    if refusal.param:
        error["param"] = refusal.param
    return {"error": error}


def questions(catalogue: Catalogue) -> list[Question]:
    """The routes that no model answers."""

    async def models(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"models": [_model(each) for each in catalogue.models()]}

    async def load(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        fields = Fields(body)
        name, ttl = fields.text("model"), fields.number("ttl", 0)
        if not name:
            raise Refusal("invalid", "model is missing: name one of /api/v1/models", "model")
        echo, length = fields.flag("echo_load_config", False), fields.whole("context_length", 1)
        began = time.monotonic()
        listed = await catalogue.load(name, math.inf if ttl is None else ttl, length)
        made = {
            "type": "llm",
            "instance_id": listed.name,
            "load_time_seconds": round(time.monotonic() - began, 3),
            "status": "loaded",
        }
        return made | ({"load_config": _config(listed)} if echo else {})

    async def unload(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        name = Fields(body).text("instance_id")
        if not name:
            raise Refusal("invalid", "instance_id is missing: name one of loaded_instances", "instance_id")
        await catalogue.unload(name)
        return {"instance_id": name}

    async def download(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        raise Refusal("invalid", _NO_DOWNLOAD)

    async def older_models(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return {"object": "list", "data": [_older(each) for each in catalogue.models()]}

    async def older_model(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        return _older(found(catalogue, path["name"]))

    async def embed(body: Mapping[str, Any], path: Mapping[str, str]) -> dict[str, Any]:
        raise Refusal("invalid", "this model answers and makes no embeddings: use another server for them")

    return [
        Question("GET", "/api/v1/models", models, refused),
        Question("POST", "/api/v1/models/load", load, refused),
        Question("POST", "/api/v1/models/unload", unload, refused),
        Question("POST", "/api/v1/models/download", download, refused),
        Question("GET", "/api/v1/models/download/status/{name:path}", download, refused),
        Question("GET", "/api/v0/models", older_models, refused),
        Question("GET", "/api/v0/models/{name:path}", older_model, refused),
        Question("POST", "/api/v0/embeddings", embed, refused),
    ]


def _model(listed: Listed) -> dict[str, Any]:
    stored = listed.stored
    return {
        "type": "llm",
        "publisher": _publisher(listed),
        "key": listed.name,
        "display_name": listed.name.rpartition("/")[2].replace("-", " "),
        "architecture": _architecture(listed),
        "quantization": {"name": _quantization(listed), "bits_per_weight": stored.bits_per_weight},
        "size_bytes": stored.nbytes,
        "params_string": listed.size,
        "loaded_instances": [{"id": listed.name, "config": _config(listed)}] if listed.loaded else [],
        "max_context_length": stored.context_length or 0,
        "format": _format(listed),
        "capabilities": {
            "vision": bool(stored.vision),
            "trained_for_tool_use": True,
            "reasoning": {"allowed_options": ["off", "on", "low", "medium", "high"], "default": "on"},
        },
        "description": None,
    }


def _older(listed: Listed) -> dict[str, Any]:
    made = {
        "id": listed.name,
        "object": "model",
        "type": "vlm" if listed.stored.vision else "llm",
        "publisher": _publisher(listed),
        "arch": _architecture(listed),
        "compatibility_type": _format(listed),
        "quantization": _quantization(listed) or "",
        "state": "loaded" if listed.loaded else "not-loaded",
        "max_context_length": listed.stored.context_length or 0,
        "capabilities": ["tool_use"],
    }
    return made | ({"loaded_context_length": _config(listed)["context_length"]} if listed.loaded else {})


def _config(listed: Listed) -> dict[str, Any]:
    length = listed.context_length or listed.stored.context_length or 0
    return {"context_length": length} | ({"parallel": listed.parallel} if listed.parallel else {})


def _publisher(listed: Listed) -> str:
    """The first part of a name of two; a folder has none."""
    publisher, _, model = listed.name.rpartition("/")
    return publisher if model and publisher and "/" not in publisher and publisher != "." else "local"


def _architecture(listed: Listed) -> str:
    return "qwen3_5_moe" if listed.stored.architecture == "moe" else "qwen3_5"


def _quantization(listed: Listed) -> str | None:
    """As LM Studio writes it behind a name: 4bit, Q4_K_M."""
    found = listed.stored.quantization
    return None if found is None else found.removeprefix("gguf ").replace("-bit", "bit")


def _format(listed: Listed) -> str:
    return "gguf" if (listed.stored.quantization or "").startswith("gguf ") else "mlx"
