"""The public face of the package: which name lives in which module.

Knows names and modules. Loads none of them: a name is imported when it is first asked for (PEP 562), so that
`import mlx_qwen35` costs next to nothing and a user of the tokenizer alone never waits for the model.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mlx_qwen35.checkpoint.adapters import fuse, load_adapter, save_adapter
    from mlx_qwen35.config import ModelConfig
    from mlx_qwen35.engine.engine import Engine
    from mlx_qwen35.errors import CheckpointError, PromptError, Qwen35Error, SessionError
    from mlx_qwen35.generation import Completion, Part, generate, generate_batch, stream_generate
    from mlx_qwen35.library import load, load_model, load_processor
    from mlx_qwen35.library.converting import convert
    from mlx_qwen35.library.drafting import load_draft_model
    from mlx_qwen35.library.estimating import estimate
    from mlx_qwen35.library.listing import list_models
    from mlx_qwen35.library.plan import Plan
    from mlx_qwen35.model import Model
    from mlx_qwen35.notebook import Chat, ProgressBar, Reply
    from mlx_qwen35.processor import Processor, Prompt
    from mlx_qwen35.sampling import Sampling
    from mlx_qwen35.serving.server import serve
    from mlx_qwen35.session import Session, Sessions, load_session
    from mlx_qwen35.session.store import Store

if sys.version_info < (3, 10):  # noqa: UP036  - a clone is imported by whatever Python there is
    _told = "mlx-qwen35 needs Python 3.10 or newer, and this is %d.%d (%s): in its clone `make demo` looks for one"
    _told %= (sys.version_info[0], sys.version_info[1], sys.executable)
    if sys.argv[:1] == ["-m"]:  # which would print where it was raised
        sys.exit("error: " + _told)
    raise ImportError(_told)

__version__ = "0.1.0"

__all__ = [
    "Chat",
    "CheckpointError",
    "Completion",
    "Engine",
    "Model",
    "ModelConfig",
    "Part",
    "Plan",
    "Processor",
    "ProgressBar",
    "Prompt",
    "PromptError",
    "Qwen35Error",
    "Reply",
    "Sampling",
    "Session",
    "SessionError",
    "Sessions",
    "Store",
    "convert",
    "estimate",
    "fuse",
    "generate",
    "generate_batch",
    "list_models",
    "load",
    "load_adapter",
    "load_draft_model",
    "load_model",
    "load_processor",
    "load_session",
    "save_adapter",
    "serve",
    "stream_generate",
]

_HOME = {
    "Chat": "notebook",
    "CheckpointError": "errors",
    "Completion": "generation",
    "Engine": "engine.engine",
    "Model": "model",
    "ModelConfig": "config",
    "Part": "generation",
    "Plan": "library.plan",
    "Processor": "processor",
    "ProgressBar": "notebook",
    "Prompt": "processor",
    "PromptError": "errors",
    "Qwen35Error": "errors",
    "Reply": "notebook",
    "Sampling": "sampling",
    "Session": "session",
    "SessionError": "errors",
    "Sessions": "session",
    "Store": "session.store",
    "convert": "library.converting",
    "estimate": "library.estimating",
    "fuse": "checkpoint.adapters",
    "generate": "generation",
    "generate_batch": "generation",
    "list_models": "library.listing",
    "load": "library",
    "load_adapter": "checkpoint.adapters",
    "load_draft_model": "library.drafting",
    "load_model": "library",
    "load_processor": "library",
    "load_session": "session",
    "save_adapter": "checkpoint.adapters",
    "serve": "serving.server",
    "stream_generate": "generation",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'mlx_qwen35' has no attribute {name!r}")
    value = getattr(import_module(f"mlx_qwen35.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
