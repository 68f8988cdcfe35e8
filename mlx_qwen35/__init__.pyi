"""The public face of the package: which name lives in which module. __init__.py reads these lines."""

from mlx_qwen35.checkpoint.adapters import fuse as fuse
from mlx_qwen35.checkpoint.adapters import load_adapter as load_adapter
from mlx_qwen35.checkpoint.adapters import save_adapter as save_adapter
from mlx_qwen35.config import ModelConfig as ModelConfig
from mlx_qwen35.engine.engine import Engine as Engine
from mlx_qwen35.errors import CheckpointError as CheckpointError
from mlx_qwen35.errors import PromptError as PromptError
from mlx_qwen35.errors import Qwen35Error as Qwen35Error
from mlx_qwen35.errors import SessionError as SessionError
from mlx_qwen35.generation import Completion as Completion
from mlx_qwen35.generation import Part as Part
from mlx_qwen35.generation import generate as generate
from mlx_qwen35.generation import generate_batch as generate_batch
from mlx_qwen35.generation import stream_generate as stream_generate
from mlx_qwen35.library import load as load
from mlx_qwen35.library import load_model as load_model
from mlx_qwen35.library import load_processor as load_processor
from mlx_qwen35.library.converting import convert as convert
from mlx_qwen35.library.drafting import load_draft_model as load_draft_model
from mlx_qwen35.library.estimating import estimate as estimate
from mlx_qwen35.library.listing import list_models as list_models
from mlx_qwen35.library.plan import Plan as Plan
from mlx_qwen35.model import Model as Model
from mlx_qwen35.notebook import Chat as Chat
from mlx_qwen35.notebook import ProgressBar as ProgressBar
from mlx_qwen35.notebook import Reply as Reply
from mlx_qwen35.processor import Processor as Processor
from mlx_qwen35.processor import Prompt as Prompt
from mlx_qwen35.sampling import Sampling as Sampling
from mlx_qwen35.serving.server import serve as serve
from mlx_qwen35.session import Session as Session
from mlx_qwen35.session import Sessions as Sessions
from mlx_qwen35.session import load_session as load_session
from mlx_qwen35.session.store import Store as Store

__version__: str
