"""Which model is meant by a name, what lies on this machine, and what fits. Knows nothing of how it computes."""

from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.finding import demo_folder, find
from mlx_qwen35.library.listing import LocalModel, list_models
from mlx_qwen35.library.loading import load, load_model, load_processor
from mlx_qwen35.library.plan import Plan

__all__ = [
    "LocalModel",
    "Plan",
    "demo_folder",
    "estimate",
    "find",
    "list_models",
    "load",
    "load_model",
    "load_processor",
]
