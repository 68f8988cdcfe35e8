"""Pictures and videos: from files to patch rows, to features, to positions. Knows nothing of text or of layers."""

from mlx_qwen35.vision.media import Media

__all__ = ["Media"]
