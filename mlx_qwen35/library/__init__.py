"""Which model is meant by a name, what lies on this machine, and what fits. Knows nothing of how it computes.

What lists and estimates is imported from its own modules: a start needs none of it.
"""

from mlx_qwen35.library.finding import demo_folder, find
from mlx_qwen35.library.holding import Held, hold
from mlx_qwen35.library.loading import load, load_held, load_model, load_processor

__all__ = ["Held", "demo_folder", "find", "hold", "load", "load_held", "load_model", "load_processor"]
