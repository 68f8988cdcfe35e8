"""Side by side with mlx-lm, in one process: the same files give the same logits, whoever wrote them.

Knows mlx-lm's functions to load, quantize and save. Skipped, with the reason, where mlx-lm is not installed.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import convert, load_model
from tests import figures
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

peer = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")

# Every input width a multiple of 64, so that each quantization group fits; heads and layers stay unequal.
SIZES = {
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 3,  # mlx-lm reads this and not layer_types
    "hidden_size": 128,
    "head_dim": 32,
    "num_attention_heads": 6,
    "linear_value_head_dim": 64,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
    "rope_parameters": {"mrope_section": [3, 3, 2]},
}
FFN = {
    "dense": {"intermediate_size": 192},
    "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
}
QUANTIZED = [(4, 64, "affine"), (8, 32, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")]

modes = pytest.mark.parametrize("bits, group_size, mode", QUANTIZED, ids=str)


@pytest.fixture(params=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A random HF checkpoint with a vision tower and an MTP layer beside the text model, as published ones have."""
    config = tiny_config(request.param, vision=True, mtp_num_hidden_layers=1, **SIZES, **FFN[request.param])
    return write_checkpoint(tmp_path / "hf", config, random_tensors(config, 11), shards=3)


def agree(ours: Any, theirs: Any) -> None:
    """Logits of the whole, and of a prefill with steps after it, each through the model's own cache."""
    ids = mx.array(np.random.RandomState(5).randint(0, 80, (1, 41)))
    figures.hold(figures.PEERS, float(np.abs(np.array(ours(ids)) - np.array(theirs(ids))).max()))
    our_cache, their_cache = ours.make_cache(), theirs.make_cache()
    for start, stop in [(0, 36), (36, 37), (37, 38), (38, 41)]:
        mine = np.array(ours(ids[:, start:stop], our_cache))
        other = np.array(theirs(ids[:, start:stop], cache=their_cache))
        figures.hold(figures.PEERS, float(np.abs(mine - other).max()))


def saved_by_mlx_lm(source: Path, target: Path, bits: int, group_size: int, mode: str) -> Any:
    """Quantize with mlx-lm, save with mlx-lm; returns its model."""
    model, config = peer.load_model(source)
    model, config = peer.quantize_model(model, config, group_size, bits, mode)
    peer.save_model(target, model)
    peer.save_config(config, target / "config.json")
    return model


def test_reads_hf_as_mlx_lm_does(source: Path) -> None:
    agree(load_model(source), peer.load_model(source)[0])


def test_reads_what_mlx_lm_writes(source: Path, tmp_path: Path) -> None:
    theirs, config = peer.load_model(source)
    peer.save_model(tmp_path / "mlx", theirs)
    peer.save_config(config, tmp_path / "mlx/config.json")
    agree(load_model(tmp_path / "mlx"), theirs)


@modes
def test_reads_what_mlx_lm_quantizes(source: Path, tmp_path: Path, bits: int, group_size: int, mode: str) -> None:
    theirs = saved_by_mlx_lm(source, tmp_path / "mlx", bits, group_size, mode)
    agree(load_model(tmp_path / "mlx"), theirs)


def test_mlx_lm_reads_what_we_convert(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "mlx", bits=None)
    agree(load_model(tmp_path / "mlx"), peer.load_model(tmp_path / "mlx")[0])
    agree(load_model(source), peer.load_model(tmp_path / "mlx")[0])


@modes
def test_mlx_lm_reads_what_we_quantize(source: Path, tmp_path: Path, bits: int, group_size: int, mode: str) -> None:
    convert(source, tmp_path / "mlx", bits=bits, group_size=group_size, mode=mode)
    agree(load_model(tmp_path / "mlx"), peer.load_model(tmp_path / "mlx")[0])
