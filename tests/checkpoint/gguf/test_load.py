"""Models out of GGUF files, against the same models as Hugging Face has them: every type, every variant."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from tests.checkpoint.gguf.building import config_of, matrices, write_gguf
from tests.checkpoints import random_tensors, write_checkpoint
from tests.tiny_model import some_tokens

EXACT = [
    "F32", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q3_K", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0",
    "Q1_0", "MXFP4", "NVFP4",
]  # fmt: skip
DECODED = ["F16", "BF16", "Q6_K", "Q2_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"]
TOKENS = some_tokens(19, vocab=290)


def logits(path, **kwargs) -> np.ndarray:
    return np.array(load_model(path, dtype="float32", **kwargs)(mx.array([TOKENS]))[0])


def plain_weights(path) -> dict[str, np.ndarray]:
    """Every weight of a checkpoint as it counts, in float32, by our names."""
    from mlx_qwen35.checkpoint.quantize import unpack

    source, made = open_source(path), {}
    for name, part in source.parts.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        found = part.finish(part.fetch(), None)
        spec = source.specs.get(module)
        if spec:
            beside = (f"{module}.{k}" for k in ("scales", "biases"))
            parts = {n.rpartition(".")[2]: source.parts[n] for n in beside if n in source.parts}
            found = unpack({"weight": found} | {k: p.finish(p.fetch(), None) for k, p in parts.items()}, spec)
        made[name] = np.array(found.astype(mx.float32))
    return made


def same(found, wanted) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        if name.endswith("A_log"):
            np.testing.assert_allclose(found[name], wanted[name], rtol=1e-5, atol=1e-6)
        elif "norm" in name:
            np.testing.assert_array_max_ulp(found[name], wanted[name], 1)
        else:
            np.testing.assert_array_equal(found[name], wanted[name], err_msg=name)


@pytest.mark.parametrize("kind", EXACT + DECODED)
def test_a_dense_model_of_every_type(tmp_path, kind):
    config = config_of("dense", mtp_num_hidden_layers=1)
    meant = write_gguf(tmp_path / "a.gguf", config, random_tensors(config), matrices(kind))
    plain = write_checkpoint(tmp_path / "plain", config, meant)
    same(plain_weights(tmp_path / "a.gguf"), plain_weights(plain))
    specs = open_source(tmp_path / "a.gguf").specs
    assert bool(specs) == (kind in EXACT[1:])
    np.testing.assert_allclose(logits(tmp_path / "a.gguf"), logits(plain), atol=2e-3, rtol=0)
