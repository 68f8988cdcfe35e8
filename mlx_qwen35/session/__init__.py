"""What was computed of a conversation or a document, kept so that nothing is computed twice."""

from mlx_qwen35.session.pool import Sessions
from mlx_qwen35.session.saving import load_session
from mlx_qwen35.session.store import Store
from mlx_qwen35.session.timeline import Session

__all__ = ["Session", "Sessions", "Store", "load_session"]
