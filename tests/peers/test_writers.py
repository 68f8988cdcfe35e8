"""Checkpoints and adapters that other libraries themselves write, on the CPU: we read what they mean.

Runs only where asked for, with the Python of an environment that has them (tests/peers/writers has the scripts):

    python -m venv ENV; ENV/bin/pip install compressed-tensors==0.20.1 peft==0.21.2 transformers==5.24.0 torch
    pytest tests/peers/test_writers.py --writers=ENV/bin/python
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.adapters import load_adapter
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from tests.checkpoint.test_form_matrix import values
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

TOKENS = [3, 8, 1, 60, 22, 7, 19, 41, 5]
# Rows that groups of 32 divide, and most of 64; blocks of 128 end inside.
SIZES: dict[str, Any] = {
    "hidden_size": 192, "head_dim": 32, "num_attention_heads": 6, "num_key_value_heads": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 48,
    "rope_parameters": {"mrope_section": [4, 2, 2]}, "layer_types": ["linear_attention", "full_attention"],
    "full_attention_interval": 2, "tie_word_embeddings": False,
}  # fmt: skip
FFN = {"dense": {"intermediate_size": 320},
       "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 96, "num_experts": 4}}  # fmt: skip
INTS = {"type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
SCHEMES = {
    "w4a16": ("pack-quantized", INTS | {"num_bits": 4}, "affine"),
    "w4a16, zeros": ("pack-quantized", INTS | {"num_bits": 4, "symmetric": False}, "affine"),
    "w8a16, a scale a row": (
        "pack-quantized", {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}, "affine"
    ),
    "int8": ("int-quantized", {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}, "affine"),
    "fp8, a scale a tensor": (
        "float-quantized", {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}, "mxfp8"
    ),
    "fp8, a scale a row": (
        "float-quantized", {"type": "float", "num_bits": 8, "strategy": "channel", "symmetric": True}, "mxfp8"
    ),
    "fp8, blocks": (
        "float-quantized",
        {"type": "float", "num_bits": 8, "strategy": "block", "block_structure": [128, 128], "symmetric": True}, None,
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "tensor_group", "group_size": 16, "symmetric": True,
         "scale_dtype": "float8_e4m3fn"}, "nvfp4",
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        {"type": "float", "num_bits": 4, "strategy": "group", "group_size": 32, "symmetric": True,
         "scale_dtype": "uint8"}, "mxfp4",
    ),
}  # fmt: skip
ADAPTERS = {
    "ranks and alphas": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "up_proj", "in_proj_qkv"],
                                   "rank_pattern": {"up_proj": 2}, "alpha_pattern": {"q_proj": 9}}),
    "rslora": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": ["o_proj", "out_proj"], "use_rslora": True}),
    "dora": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "whole modules": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": ["v_proj"], "modules_to_save": ["lm_head"]}),
    "embeddings": ("dense", {"r": 4, "lora_alpha": 6, "target_modules": ["embed_tokens", "gate_proj"]}),
    "experts": ("moe", {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj"],
                        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}),
}  # fmt: skip


@pytest.fixture(scope="module")
def python(pytestconfig: pytest.Config) -> Path:
    named = pytestconfig.getoption("--writers")
    if named is None:
        pytest.skip("other libraries write only where asked for: --writers=ENV/bin/python")
    return Path(named)


def write(python: Path, script: str, *words: object) -> None:
    command = [str(word) for word in (python, Path(__file__).parent / "writers" / script, *words)]
    env = {name: value for name, value in os.environ.items() if name not in ("LD_PRELOAD", "PYTHONPATH")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)
    assert done.returncode == 0, done.stderr[-3000:]


def source(folder: Path, kind: str = "dense") -> Path:
    config = tiny_config(kind, flat=True, **SIZES | FFN[kind])
    return write_checkpoint(folder, config, random_tensors(config, 7))


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder, dtype="float32")(mx.array([TOKENS])))[0]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compressed_tensors(python: Path, tmp_path: Path, scheme: str, dtype: str) -> None:
    """Every value is what the library decodes, up to how it rounds; and so is what the model says."""
    form, weights, mode = SCHEMES[scheme]
    told = json.dumps({"format": form, "weights": weights})
    write(python, "with_compressed_tensors.py", source(tmp_path / "a"), told, dtype, tmp_path / "b", tmp_path / "plain")
    found, due = open_source(tmp_path / "b"), open_source(tmp_path / "plain")
    assert {spec.mode for spec in found.specs.values()} == ({mode} if mode else set())
    packed = [name for name in due.parts if name.endswith(("_proj.weight", "in_proj_qkv.weight", "in_proj_z.weight"))]
    assert len(packed) == 2 * 3 + 3 + 4
    exact = dtype == "float32" and mode != "nvfp4"  # which it decodes in bfloat16 whatever the model is in
    for name in packed:
        mine, theirs = (values(s, name.removesuffix(".weight")) for s in (found, due))
        apart = np.abs(mine - theirs).max() / np.abs(theirs).max()
        assert apart <= (1e-6 if exact else 2**-8), (name, apart)
    difference = np.abs(logits(tmp_path / "b") - logits(tmp_path / "plain")).max()
    print(f"{scheme}, {dtype}: {difference:.1e} apart")
    assert difference <= (2e-3 if exact else 0.3) and np.abs(logits(tmp_path / "plain")).max() > 0.5


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft(python: Path, tmp_path: Path, name: str) -> None:
    """With the adapter on the model, and merged by a conversion, the model says what it says there."""
    kind, config = ADAPTERS[name]
    folder = source(tmp_path / "a", kind)
    write(python, "with_peft.py", folder, json.dumps(config), json.dumps(TOKENS), tmp_path / "b", tmp_path / "said.npy")
    due, before = np.load(tmp_path / "said.npy"), logits(folder)
    model = load_adapter(load_model(folder), tmp_path / "b")
    found = np.array(model(mx.array([TOKENS])))[0]
    merged = logits(convert(folder, tmp_path / "c", bits=None, adapter_path=tmp_path / "b"))
    print(f"{name}: {np.abs(found - due).max():.1e} and, merged, {np.abs(merged - due).max():.1e} apart")
    assert np.abs(found - due).max() <= 2e-3 and np.abs(merged - due).max() <= 2e-3 < 0.05 < np.abs(due - before).max()
