"""A call with a few tokens gives of each what a call with it alone does, bit for bit; and the state after each."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_qwen35.cache import Cache, KVCache, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.model import Model
from mlx_qwen35.speculative.pace import MOST
from tests.checkpoints import tiny_config
from tests.talkers import random_model
from tests.tiny_model import tiny_model

TOKENS = np.random.RandomState(2).randint(0, 96, 80).tolist()


def quantized(**how) -> Model:
    sizes = {"hidden_size": 64, "head_dim": 32, "linear_value_head_dim": 32, "linear_num_value_heads": 4}
    ffn = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    rope = {"rope_parameters": {"mrope_section": [3, 3, 2]}}
    model, _ = tiny_model("moe", **sizes, **ffn, **rope)
    nn.quantize(model, class_predicate=lambda path, module: hasattr(module, "to_quantized"), **how)
    model.eval()
    return model


MODELS = {
    "dense": lambda: random_model("dense"),
    "moe": lambda: random_model("moe"),
    "4 bits": lambda: quantized(group_size=32, bits=4),
    "mxfp4": lambda: quantized(group_size=32, bits=4, mode="mxfp4"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request) -> Model:
    assert tiny_config("moe")["text_config"]["vocab_size"] == 96
    return MODELS[request.param]()


@pytest.mark.parametrize("past", [1, 13, 62])
def test_a_few_tokens_are_each_token_alone(model, past):
    check(model, model.make_cache(), past)


@pytest.mark.parametrize("form", [None, KVFormat(4, 32), KVFormat(8, 32, start=15)], ids=str)
def test_and_so_with_keys_in_stretches_or_in_few_bits(form):
    model = quantized(group_size=32, bits=4)
    layers = [StretchedKVCache(form) if isinstance(layer, KVCache) else layer for layer in model.make_cache()]
    check(model, Cache(layers), 13)
    cache = model.make_cache()
    model.hidden(mx.array([TOKENS[:9]]), cache)
    check(model, cache.branch()[0], 22)


def check(model, cache, past):
    mx.eval(model.hidden(mx.array([TOKENS[cache.offset : past]]), cache), cache.arrays())
    start = cache.snapshot()
    for count in range(2, MOST + 2):
        new = TOKENS[past : past + count]
        with cache.each_step() as after:
            together = np.array(model(mx.array([new]), cache))
        assert len(after) == count and cache.offset == past + count
        kept = [[np.array(a) for pair in snapshot.delta if pair for a in pair] for snapshot in after]
        cache.restore(start)
        for number, token in enumerate(new):
            alone = np.array(model(mx.array([[token]]), cache))
            assert np.array_equal(together[:, number : number + 1], alone)
            states = [a for layer in cache.layers if hasattr(layer, "conv") for a in layer.arrays()]
            assert all(np.array_equal(one, np.array(other)) for one, other in zip(kept[number], states, strict=True))
            assert after[number].offset == cache.offset
        cache.restore(start)


def test_going_back_to_a_step_is_as_if_the_others_had_not_been(model):
    cache = model.make_cache()
    model.hidden(mx.array([TOKENS[:9]]), cache)
    with cache.each_step() as after:
        model.hidden(mx.array([TOKENS[9:14]]), cache)
    cache.restore(after[1])
    assert cache.offset == 11 and all(getattr(layer, "steps", None) is None for layer in cache.layers)
    again = model.make_cache()
    model.hidden(mx.array([TOKENS[:9]]), again)
    for token in TOKENS[9:11]:
        model.hidden(mx.array([[token]]), again)
    new = mx.array([TOKENS[30:33]])
    assert np.array_equal(np.array(model(new, cache)), np.array(model(new, again)))
