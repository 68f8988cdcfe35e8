"""Which forms are read: a line for each, and what is said of all others.

Knows where a checkpoint names its form. A new one is a file beside this and a line in FORMS.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_qwen35.checkpoint.forms import awq, bitsandbytes, compressed, fp8, gptq, modelopt
from mlx_qwen35.checkpoint.forms.face import LEAST, Form
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError

Section = Mapping[str, Any]


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
    Line(("awq",), awq.read_config),
    Line(("compressed-tensors",), compressed.read_config),
    Line(("bitsandbytes",), bitsandbytes.read_config),
    Line(("modelopt", "modelopt_fp4", "modelopt_mixed"), modelopt.read_config),
)
READ_TODAY = (
    "This package reads BF16, FP16 and FP32 checkpoints, MLX (affine, mxfp4, mxfp8, nvfp4), and those of "
    f"{', '.join(line.methods[0] for line in FORMS)}: {LEAST}"
)


def find_form(config: ModelConfig, where: str) -> Form | None:
    """How another tool quantized a checkpoint, by its config.json; None: no other tool did.

    where: that file, for errors. Raises CheckpointError where the form is not read.
    """
    section = config.source_quantization
    if section is None:
        return None
    method = section.get("quant_method")
    if modelopt.algorithm(section):
        return modelopt.read_config(section, config.raw, where)
    line = next((line for line in FORMS if method in line.methods), None)
    if line is None:
        raise CheckpointError(f"{where}: quant_method is {method!r:.40}, which is not supported yet. {READ_TODAY}")
    return line.read(section, config.raw, where)


def form_beside(folder: Path, config: ModelConfig, names: Iterable[str]) -> Form | None:
    """The form of a checkpoint whose config.json is silent, by a file beside it and the tensors that are there."""
    if config.quantization is not None or config.source_quantization is not None:
        return None
    section = modelopt.beside(folder)
    if section is None or not any(name.endswith(".weight_scale") for name in names):
        return None
    return modelopt.read_config(section, config.raw, str(folder / modelopt.FILE))
