"""The GGUF that benchmarks/convert_gguf.py converts: types where llama-quantize puts them, and a model that loads."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from benchmarks import convert_gguf
from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.source import open_source

SIZES = {
    "hidden_size": 512, "num_experts": 9, "vocab_size": 320, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 768, "num_attention_heads": 4, "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}  # fmt: skip


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "model-Q4_K_M.gguf"
    convert_gguf.write_gguf(path, 9, **SIZES)
    return path


def test_types(path: Path) -> None:
    """v_proj and the head in Q6_K; down_proj and in_proj_qkv in the first and last eighth of layers and every third."""
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == "Q4_K" and kinds["output.weight"] == "Q6_K"
    assert {number for number in range(9) if kinds[f"blk.{number}.ffn_down_exps.weight"] == "Q6_K"} == {0, 3, 6, 7, 8}
    assert {number for number in range(0, 9, 2) if kinds[f"blk.{number}.attn_qkv.weight"] == "Q6_K"} == {0, 6, 8}
    assert {kinds[f"blk.{number}.attn_v.weight"] for number in range(1, 9, 2)} == {"Q6_K"}
    floats = [kind for name, kind in kinds.items() if "norm" in name or name.endswith(("ssm_a", "gate_inp.weight"))]
    assert set(floats) == {"F32"} and set(kinds.values()) == {"F32", "Q4_K", "Q6_K"}
    for name in ("blk.1.ffn_gate_exps.weight", "output.weight"):
        values = dequantize(tensors[name].data, tensors[name].tensor_type)
        assert np.isfinite(values).all() and 2e-3 < values.std() < 5e-2


def test_it_is_read(path: Path) -> None:
    origin = open_source(path)
    count = sum(int(np.prod(shape)) for shape in text_tensors(origin.config).values())
    assert count == convert_gguf.weights_of(9, False, SIZES)
