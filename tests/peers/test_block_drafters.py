"""Block drafters as mlx-vlm computes them: hidden states, logits and drafts of random ones are ours."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen35 import convert
from mlx_qwen35.blocks.config import BlockConfig
from mlx_qwen35.blocks.drafter import BlockDraftModel
from mlx_qwen35.checkpoint.blocks import open_blocks
from tests.blocks import filled, published, tensors, write

KINDS = {
    "DFlash": ("DFlash", {}, {}),
    "causal": ("DFlash", {"causal": True}, {}),
    "causal, full": ("DFlash", {"causal": True}, {"layer_types": ["full_attention"] * 3}),
    "sinks and a cap": ("DFlash", {"attention_sink_bias": True}, {"final_logit_softcapping": 3.0}),
    "DFlash2": ("DFlash2", {}, {}),
    "DFlash2, scaled": ("DFlash2", {"input_embedding_scale": 1.7, "output_multiplier": 0.6, "conv_kernel_size": 3}, {}),
}


@pytest.fixture(scope="module")
def drafters():
    return pytest.importorskip("mlx_vlm.speculative.drafters", reason="mlx-vlm is not installed", exc_type=ImportError)


def theirs(drafters, config):
    if "conv_kernel_size" in config["dflash_config"]:
        kind = __import__("mlx_vlm.speculative.drafters.dflash2", fromlist=["Model", "ModelConfig"])
    else:
        kind = __import__("mlx_vlm.speculative.drafters.qwen3_dflash", fromlist=["Model", "ModelConfig"])
    return kind.Model(kind.ModelConfig.from_dict(config))


def bind(peer, table: nn.Embedding, head: nn.Linear) -> None:
    """To a target's embedding and head."""
    peer.embed_tokens, peer.lm_head = table, head


@pytest.fixture(scope="module")
def target():
    mx.random.seed(4)
    table, head = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
    table.weight = mx.random.normal((96, 64))
    return table, head


def spoken(length: int, seed: int) -> mx.array:
    return mx.array(np.random.default_rng(seed).standard_normal((1, length, 128)).astype(np.float32))


def drafts(model: BlockDraftModel, target, block: list[int], windows) -> tuple[np.ndarray, list[int]]:
    """Our logits of the rows behind the first, and what is likeliest along them."""
    table, head = target
    found = []

    def choose(logits):
        found.append(mx.argmax(logits, axis=-1))
        return found[-1]

    hidden = model(table(mx.array([block])), windows)[:, 1:]
    logits = model.logits(head(hidden))
    model.walk(mx.array(block[:1]), hidden, logits, choose)
    return np.array(logits), [one.item() for one in found]


@pytest.mark.parametrize("name", KINDS)
def test_blocks_after_a_growing_context(drafters, target, name):
    """Longer than a window at once, and then one position at a time. mlx-vlm keeps a few more where several come, and
    with a mask it takes keys of a window that has turned over for others: that is left out."""
    kind, section, more = KINDS[name]
    config = published(kind, section=section, **more)
    peer = theirs(drafters, config)
    peer.load_weights(list(peer.sanitize({n: mx.array(v) for n, v in tensors(config).items()}).items()))
    bind(peer, *target)
    model = filled(BlockDraftModel(BlockConfig.from_dict(config, "config.json")), config)
    cache, windows = peer.make_cache(), model.make_windows()
    twin = peer.make_cache()
    for number, length in enumerate([17] if name == "causal" else [17, 1, 1, 1]):
        block = [5 + number, *[90] * (3 + number)]
        context = spoken(length, number)
        other = np.array(peer(mx.array([block]), context, cache))[:, 1:]
        said = peer.draft_block(block[0], context, twin, len(block), lambda logits: mx.argmax(logits, axis=-1))
        model.remember(context, windows)
        mine, guesses = drafts(model, target, block, windows)
        np.testing.assert_allclose(mine, other, atol=2e-3)
        assert guesses == said[0].tolist()
    assert np.abs(mine).max() > 1


@pytest.mark.parametrize("kind", ["DFlash", "DFlash2"])
def test_what_convert_writes_mlx_vlm_reads(drafters, target, tmp_path, kind):
    config = published(kind)
    source = write(tmp_path / "a", config, tensors(config))
    folder = convert(source, tmp_path / "b", bits=4, group_size=32)
    weights = mx.load(str(folder / "model.safetensors"))
    peer = theirs(drafters, config)
    nn.quantize(peer, 32, 4, class_predicate=lambda path, module: f"{path}.scales" in weights)
    peer.load_weights(list(peer.sanitize(weights).items()))
    bind(peer, *target)
    model = open_blocks(folder).load()
    cache, windows = peer.make_cache(), model.make_windows()
    other = np.array(peer(mx.array([[7, 90, 90]]), spoken(9, 1), cache))[:, 1:]
    model.remember(spoken(9, 1), windows)
    np.testing.assert_allclose(drafts(model, target, [7, 90, 90], windows)[0], other, atol=2e-3)
