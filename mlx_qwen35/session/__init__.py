"""What was computed of a conversation or a document, kept so that nothing is computed twice."""

from mlx_qwen35.session.pool import Sessions
from mlx_qwen35.session.saving import Session, load_session
from mlx_qwen35.session.store import Store

__all__ = ["Session", "Sessions", "Store", "load_session"]
