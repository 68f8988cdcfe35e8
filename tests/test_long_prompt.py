"""Memory for reading a long prompt: the cache and a constant, also where the cache is packed or the prompt goes on."""

import mlx.core as mx
import pytest

from benchmarks.long_prompt import MIB, measured
from mlx_qwen35.layers import attention, stretches


@pytest.mark.parametrize("kv_bits", [None, 8])
def test_the_memory_beside_the_cache_does_not_grow(monkeypatch, kv_bits):
    """benchmarks/long_prompt.py at a sixteenth of its lengths, with tiles a sixteenth as large."""
    for tiles in (attention.causal_attention, stretches.stretched_attention):
        monkeypatch.setitem(tiles.__kwdefaults__, "most_scores", tiles.__kwdefaults__["most_scores"] // 64)
    short, _, long = (measured(length, kv_bits) for length in (4096, 2048, 16_384))
    assert long["cache"] >= 3.9 * short["cache"]
    for _ in range(3):  # how far one lane runs ahead of the other is chance, and more of it where others compute
        if long["rest"] >= short["rest"] + 2 * MIB:
            long = measured(16_384, kv_bits)
    assert long["rest"] < short["rest"] + 2 * MIB, (short, long)
    assert short["rest"] < 60 * MIB
    mx.clear_cache()
