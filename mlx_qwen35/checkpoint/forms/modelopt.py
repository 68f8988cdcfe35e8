"""NVIDIA ModelOpt's quantizations, which are recognised and refused by name.

Knows where ModelOpt says what it did: quantization_config of config.json, or hf_quant_config.json beside it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.files import TensorFiles
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError

FILE = "hf_quant_config.json"
_KEYS = ("moe_quant_algo", "quant_algo")
_SCALES = (".weight_scale", ".weight_scale_2", ".input_scale")


def algorithm(section: Mapping[str, Any]) -> str | None:
    """What ModelOpt calls the quantization that a quantization_config describes, "NVFP4" for one; None: none of it."""
    inner = section.get("quantization")
    for values in (section, inner if isinstance(inner, Mapping) else {}):
        named = next((values[key] for key in _KEYS if isinstance(values.get(key), str)), None)
        if named:
            return named
    return None


def refused(where: str, named: str) -> CheckpointError:
    """The error for a checkpoint whose quantization `where` names."""
    return CheckpointError(
        f"{where}: the weights are quantized by NVIDIA ModelOpt ({named:.40}), which is not supported yet. Take the "
        "unquantized checkpoint of the same model, the official FP8 one, or an MLX conversion (mlx-community has nvfp4)"
    )


def check(folder: Path, config: ModelConfig, found: TensorFiles) -> None:
    """Raises CheckpointError for ModelOpt's tensors of which only hf_quant_config.json speaks."""
    if config.quantization is not None or config.source_quantization is not None:
        return
    if not any(name.endswith(_SCALES) for name in found.entries):
        return
    try:
        told = json.loads((folder / FILE).read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    named = algorithm(told) if isinstance(told, dict) else None
    if named:
        raise refused(str(folder / FILE), named)
