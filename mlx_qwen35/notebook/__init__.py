"""Chats, answers and progress in a notebook. IPython is used where it runs; nothing here needs it."""

from mlx_qwen35.notebook.chat import Chat
from mlx_qwen35.notebook.progress import ProgressBar
from mlx_qwen35.notebook.reply import Reply

__all__ = ["Chat", "ProgressBar", "Reply"]
