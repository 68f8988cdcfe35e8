"""Which forms are read: a line for each, and what is said of all others.

Knows where config.json names a form. A new one is a file beside this and a line in FORMS.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mlx_qwen35.checkpoint.forms import fp8, gptq, modelopt
from mlx_qwen35.checkpoint.forms.face import LEAST, Form
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError

Section = Mapping[str, Any]
READ_TODAY = (
    "This package reads BF16, FP16 and FP32 checkpoints, FP8 with scales of 128 x 128 blocks, symmetric GPTQ and "
    f"AutoRound, and MLX (affine, mxfp4, mxfp8, nvfp4): {LEAST}"
)


@dataclass(frozen=True)
class Line:
    """A form of the table. methods: the quant_methods that name it.

    read: (quantization_config, all of config.json, where that lies, for errors) -> the form; it raises CheckpointError
    for what of the form is not read.
    """

    methods: tuple[str, ...]
    read: Callable[[Section, Section, str], Form]


FORMS = (
    Line(("fp8",), fp8.read_config),
    Line(gptq.METHODS, gptq.read_config),
)


def find_form(config: ModelConfig, where: str) -> Form | None:
    """How another tool quantized a checkpoint, by its config.json; None: no other tool did.

    where: that file, for errors. Raises CheckpointError where the form is not read.
    """
    section = config.source_quantization
    if section is None:
        return None
    method = section.get("quant_method")
    algorithm = modelopt.algorithm(section)
    if algorithm:
        raise modelopt.refused(where, algorithm)
    line = next((line for line in FORMS if method in line.methods), None)
    if line is None:
        raise CheckpointError(f"{where}: quant_method is {method!r:.40}, which is not supported yet. {READ_TODAY}")
    return line.read(section, config.raw, where)
