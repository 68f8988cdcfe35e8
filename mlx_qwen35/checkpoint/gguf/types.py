"""The constants of the GGUF format: its tensor types with their blocks, its kinds of metadata, its magic numbers.

Knows numbers and sizes, as ggml.h and gguf.h of llama.cpp have them. Knows no file and no value.
"""

from __future__ import annotations

from dataclasses import dataclass

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # 2 and 3 differ in nothing that is read here; 3 may also be big-endian
VERSION = 3
ALIGNMENT = 32  # of tensor data, where general.alignment says nothing else
MOST_DIMENSIONS = 4
LONGEST_NAME = 63  # bytes of a tensor's name: ggml's buffers hold 64


@dataclass(frozen=True)
class Kind:
    """A tensor type. values: in a block; nbytes: of a block."""

    number: int
    name: str
    values: int
    nbytes: int

    @property
    def bits(self) -> float:
        """A value, scales included."""
        return 8 * self.nbytes / self.values


KINDS = {
    kind.number: kind
    for kind in (
        Kind(0, "F32", 1, 4),
        Kind(1, "F16", 1, 2),
        Kind(2, "Q4_0", 32, 18),
        Kind(3, "Q4_1", 32, 20),
        Kind(6, "Q5_0", 32, 22),
        Kind(7, "Q5_1", 32, 24),
        Kind(8, "Q8_0", 32, 34),
        Kind(10, "Q2_K", 256, 84),
        Kind(11, "Q3_K", 256, 110),
        Kind(12, "Q4_K", 256, 144),
        Kind(13, "Q5_K", 256, 176),
        Kind(14, "Q6_K", 256, 210),
        Kind(16, "IQ2_XXS", 256, 66),
        Kind(17, "IQ2_XS", 256, 74),
        Kind(18, "IQ3_XXS", 256, 98),
        Kind(19, "IQ1_S", 256, 50),
        Kind(20, "IQ4_NL", 32, 18),
        Kind(21, "IQ3_S", 256, 110),
        Kind(22, "IQ2_S", 256, 82),
        Kind(23, "IQ4_XS", 256, 136),
        Kind(24, "I8", 1, 1),
        Kind(25, "I16", 1, 2),
        Kind(26, "I32", 1, 4),
        Kind(27, "I64", 1, 8),
        Kind(28, "F64", 1, 8),
        Kind(29, "IQ1_M", 256, 56),
        Kind(30, "BF16", 1, 2),
        Kind(34, "TQ1_0", 256, 54),
        Kind(35, "TQ2_0", 256, 66),
        Kind(39, "MXFP4", 32, 17),
        Kind(40, "NVFP4", 64, 36),
        Kind(41, "Q1_0", 128, 18),
        Kind(42, "Q2_0", 64, 18),
    )
}
NUMBERS = {kind.name: kind.number for kind in KINDS.values()}

# What no file of this family has: of activations, removed, or other programs' own. Named in refusals.
FOREIGN = {
    9: "Q8_1 (of activations)", 15: "Q8_K (of activations)",
    4: "Q4_2 (removed from ggml)", 5: "Q4_3 (removed from ggml)",
    31: "Q4_0_4_4 (removed from ggml)", 32: "Q4_0_4_8 (removed from ggml)", 33: "Q4_0_8_8 (removed from ggml)",
    36: "IQ4_NL_4_4 (removed from ggml)", 37: "IQ4_NL_4_8 (removed from ggml)", 38: "IQ4_NL_8_8 (removed from ggml)",
    142: "PQ2_0 (prism-ml's)", 143: "PTQ1_0 (prism-ml's)",
}  # fmt: skip

# The types of a metadata value, by their numbers.
U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
# How struct unpacks the fixed-size ones.
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "?", U64: "Q", I64: "q", F64: "d"}

# The types of a token of a vocabulary.
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# general.file_type: the recipe that a file was made by; single tensors have other types.
FILE_TYPES = {
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 10: "Q2_K", 11: "Q3_K_S", 12: "Q3_K_M",
    13: "Q3_K_L", 14: "Q4_K_S", 15: "Q4_K_M", 16: "Q5_K_S", 17: "Q5_K_M", 18: "Q6_K", 19: "IQ2_XXS", 20: "IQ2_XS",
    21: "Q2_K_S", 22: "IQ3_XS", 23: "IQ3_XXS", 24: "IQ1_S", 25: "IQ4_NL", 26: "IQ3_S", 27: "IQ3_M", 28: "IQ2_S",
    29: "IQ2_M", 30: "IQ4_XS", 31: "IQ1_M", 32: "BF16", 36: "TQ1_0", 37: "TQ2_0", 38: "MXFP4_MOE", 39: "NVFP4",
    40: "Q1_0", 41: "Q2_0",
}  # fmt: skip
