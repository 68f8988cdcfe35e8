"""Which tokens may come, as words of bits, put on logits.

Knows bits and logits. Knows nothing of why a token may not come, nor of how one is drawn from what is left.

A mask is made where a grammar is, in ordinary memory: bit i of word w says of token 32 w + i whether it may come. The
bits are taken apart there too, 0.04 ms for 248,320 of them, so that a mask costs the device a single operation.
"""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import ArgumentError

BITS = 32


def masked(logits: mx.array, words: np.ndarray) -> mx.array:
    """logits [B, V] -> the same, with -inf for every token that may not come; lazy.

    words: uint32, [W] for all rows or [B, W] for each its own, W at least V / 32 (bits past V say nothing). Raises
    ArgumentError for words of another form, and where a row may have no token at all.
    """
    return mx.where(mx.array(allowed(words, *logits.shape)), logits, -mx.inf)


def allowed(words: np.ndarray, rows: int, vocab_size: int) -> np.ndarray:
    """The bits of `masked` words as bool, [V] or [B, V]."""
    check(words, rows, vocab_size)
    octets = np.ascontiguousarray(words.astype("<u4", copy=False)).view(np.uint8)
    bits = np.unpackbits(octets, axis=-1, bitorder="little", count=vocab_size).view(bool)
    if not bits.any(axis=-1).all():
        raise ArgumentError("a mask lets no token come; end the answer instead")
    return bits


def check(words: np.ndarray, rows: int, vocab_size: int) -> None:
    """Refuses words of another form than `masked` takes for logits [rows, vocab_size]."""
    fits = words.ndim in (1, 2) and words.shape[-1] * BITS >= vocab_size and words.shape[:-1] in ((), (rows,))
    if words.dtype != np.uint32 or not fits:
        least = -(-vocab_size // BITS)
        raise ArgumentError(
            f"a mask is words of {words.dtype} {list(words.shape)}; for logits [{rows}, {vocab_size}] give uint32 "
            f"[{least}] or [{rows}, {least}]"
        )
