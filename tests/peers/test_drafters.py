"""Drafters as mlx-vlm itself splits them off, plain and quantized: our head is theirs."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import is_drafter, load_mtp
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

SIZES = {"hidden_size": 64, "head_dim": 32, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64,
         "rope_parameters": {"mrope_section": [3, 3, 2]}, "vocab_size": 96}  # fmt: skip


@pytest.fixture(scope="module")
def split_mtp():
    why = "mlx-vlm is not installed"
    return pytest.importorskip("mlx_vlm.split_mtp", reason=why, exc_type=ImportError).split_mtp


@pytest.mark.parametrize("quantized", [{}, {"q_bits": 4, "q_group_size": 32}], ids=["plain", "4 bits"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_reads_what_mlx_vlm_splits_off(split_mtp, tmp_path: Path, kind: str, quantized: dict) -> None:
    from mlx_vlm.speculative.drafters import qwen3_5_mtp as theirs

    config = tiny_config(kind, mtp_num_hidden_layers=1, **SIZES if kind == "moe" else SIZES | {"intermediate_size": 64})
    write_checkpoint(tmp_path / "a", config, random_tensors(config))
    drafter = split_mtp(str(tmp_path / "a"), str(tmp_path / "d"), **quantized)
    assert is_drafter(drafter)
    model = load_model(tmp_path / "a")
    head = load_mtp(drafter, model.config)
    raw = json.loads((drafter / "config.json").read_text())
    peer = theirs.Model(theirs.ModelConfig.from_dict(raw))
    weights = mx.load(str(drafter / "model.safetensors"))
    if quantized:
        import mlx.nn as nn

        nn.quantize(peer, 32, 4, class_predicate=lambda path, module: f"{path}.scales" in weights)
    peer.load_weights(list(weights.items()))
    rng = np.random.default_rng(0)
    tokens = mx.array(rng.integers(0, 96, (1, 13)))
    hidden = mx.array(rng.standard_normal((1, 13, 64)).astype(np.float32))
    mine = head(model.embed_tokens(tokens), hidden, mx.arange(13)[None])
    other = peer._forward_hidden(model.embed_tokens(tokens), hidden, None, mx.arange(13)[None])
    np.testing.assert_allclose(np.array(mine), np.array(other), atol=2e-3)
