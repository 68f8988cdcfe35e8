"""Geometry and quantization of a checkpoint, read from config.json and frozen.

fields.py         typed access to an object of a JSON file
quantization.py   what it says of quantization
geometry.py       what it says of sizes and kinds of layers
"""

from mlx_qwen35.config.geometry import DENSE_TYPES as DENSE_TYPES
from mlx_qwen35.config.geometry import HADAMARD as HADAMARD
from mlx_qwen35.config.geometry import LAYER_KINDS as LAYER_KINDS
from mlx_qwen35.config.geometry import MOE_TYPES as MOE_TYPES
from mlx_qwen35.config.geometry import ModelConfig as ModelConfig
from mlx_qwen35.config.geometry import MoE as MoE
from mlx_qwen35.config.geometry import Rope as Rope
from mlx_qwen35.config.geometry import TextConfig as TextConfig
from mlx_qwen35.config.geometry import VisionConfig as VisionConfig
from mlx_qwen35.config.geometry import Yarn as Yarn
from mlx_qwen35.config.quantization import BITS as BITS
from mlx_qwen35.config.quantization import GROUP_SIZES as GROUP_SIZES
from mlx_qwen35.config.quantization import READ_BITS as READ_BITS
from mlx_qwen35.config.quantization import USUAL as USUAL
from mlx_qwen35.config.quantization import Quantization as Quantization
from mlx_qwen35.config.quantization import QuantSpec as QuantSpec
