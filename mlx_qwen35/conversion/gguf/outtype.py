"""The types that a GGUF can be written in, and which of them each tensor gets.

Knows names and shapes. Follows llama.cpp's converter for F32, F16, BF16 and Q8_0, and llama-quantize for Q4_0, Q4_1 and
MXFP4, but for what those give Q6_K: the head is Q8_0 here, and so are the small maps of the decays, which they spoil.
"""

from __future__ import annotations

import re

from mlx_qwen35.checkpoint.gguf.types import FILE_TYPES, KINDS, NUMBERS, Kind
from mlx_qwen35.checkpoint.inventory import Shape

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "mxfp4")
_NAMED = re.compile(rf"(.+)[-_.]({'|'.join(OUTTYPES)})", re.IGNORECASE)
_FILE_NUMBERS = {name: number for number, name in FILE_TYPES.items()} | {"MXFP4": 38}
_PLAIN = ("ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "position_embd.weight")
_FINE = ("output.weight", "ssm_alpha.weight", "ssm_beta.weight")  # in a file of four bits


def split_name(name: str) -> tuple[str, str | None]:
    """The name of a GGUF file without its ending and without the type in it, and that type: "a-Q8_0.gguf" is a Q8_0."""
    stem = name.removesuffix(".gguf")
    found = _NAMED.fullmatch(stem)
    return (found[1], found[2].upper()) if found else (stem, None)


def tower_name(name: str) -> str:
    """What the file of the vision tower beside a GGUF file of this name is called."""
    return f"{name.removesuffix('.gguf')}-mmproj.gguf"


def file_number(outtype: str) -> int:
    """general.file_type."""
    return _FILE_NUMBERS[outtype]


def kind_of(name: str, shape: Shape, outtype: str, *, tied: bool = False) -> Kind:
    """The type of a tensor of this name and shape (as torch has it). tied: the embeddings are the head too."""
    return KINDS[NUMBERS[_kind_of(name, shape, outtype, tied)]]


def _kind_of(name: str, shape: Shape, outtype: str, tied: bool) -> str:
    if len(shape) < 2 or name.endswith(("_norm.weight", *_PLAIN)):
        return "F32"
    if name.startswith("v.patch_embd.weight"):
        return "F16" if outtype == "F16" else "F32"
    if not name.endswith(".weight"):
        return "F32"
    if outtype == "MXFP4" and not re.search(r"\.ffn_(gate|up|down)_exps\.", name):
        outtype = "Q8_0"
    if outtype in ("Q4_0", "Q4_1") and (name.endswith(_FINE) or (tied and name == "token_embd.weight")):
        outtype = "Q8_0"
    return "F16" if shape[-1] % KINDS[NUMBERS[outtype]].values else outtype
