"""Shares of checkpoints as they are published: packed, in records, in a GGUF; resident and streamed; in every plan."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35 import convert
from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.parallel.cuts import indivisible
from mlx_qwen35.parallel.group import FEW
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.parallel.share import RankShare
from tests.checkpoint.gguf.building import config_of, matrices, tiny_tokenizer, write_gguf
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

from .threads import Meeting, Threads, together

# Sizes that groups of 32 divide, and two ranks' parts of them too.
EVEN = {
    "hidden_size": 64, "head_dim": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 64, "vocab_size": 96, "rope_parameters": {"partial_rotary_factor": 0.25},
}  # fmt: skip
TOKENS = [5, 7, 9, 11, 3, 2, 60, 61, 14, 33]
PLANS = {
    "experts": Plan("experts", ((0, 5), (5, 8)), (), (), 0.0),
    "pipeline": Plan("pipeline", ((0, 1), (1, 4)), (), (), 0.0),
    "tensor": Plan("tensor", ((0, 4), (4, 8)), (), (), 0.0),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One checkpoint in several forms."""
    folder = tmp_path_factory.mktemp("forms")
    config = tiny_config("moe", **EVEN)
    hf = write_checkpoint(folder / "hf", config, random_tensors(config), shards=3)
    dense = tiny_config("dense", **{name: EVEN[name] for name in EVEN if "expert" not in name and "moe" not in name},
                        intermediate_size=128)  # fmt: skip
    plain = write_checkpoint(folder / "d", dense, random_tensors(dense))
    packed = convert(hf, folder / "packed", bits=4, group_size=32, pack_experts=True)
    gguf = folder / "made.gguf"
    sizes = {name: EVEN[name] for name in EVEN if name != "vocab_size"}
    sizes |= {"num_experts": 8, "num_experts_per_tok": 3, "layer_types": config["text_config"]["layer_types"]}
    kinds = config_of("moe", **sizes)
    write_gguf(gguf, kinds, random_tensors(kinds), matrices("Q8_0"), tokenizer=tiny_tokenizer())
    return {
        "hf": hf,
        "packed": packed,
        "gguf": gguf,
        "dense": convert(plain, folder / "d4", bits=4, group_size=32),
    }


def read(model: Any) -> np.ndarray:
    """Many rows, a few, and one at a time."""
    compute, cache = getattr(model, "computed", model.hidden), model.make_cache()
    x = [compute(mx.array([TOKENS * 7]), cache, (), more=True)]
    x += [compute(mx.array([TOKENS]), cache, (), more=False)]
    x += [compute(mx.array([[token]]), cache, (), more=False) for token in (4, 8)]
    return np.array(mx.concatenate(x, axis=1))


def ranked(folder: Path, plan: Plan, **how: Any) -> tuple[list[RanksModel], list[np.ndarray]]:
    meeting, config = Meeting(2), open_source(folder).config
    models = [load_model(folder, share=RankShare(config, plan, Threads(rank, 2, meeting)), **how) for rank in range(2)]
    for model in models:
        mx.eval(model.parameters())
        if "stream" in how:
            model.go_in_steps(how["stream"].chunk, how["stream"].tile)
    return models, together([lambda model=model: read(model) for model in models])


SLOTS = StreamPlan((3,) * 4, group=2, chunk=64, tile=64, cache_limit=1 << 28, memory=1 << 30)


@pytest.mark.parametrize(
    ("form", "kind", "how"),
    [
        ("packed", "experts", {}),
        ("packed", "experts", {"stream": SLOTS}),  # in records
        ("packed", "pipeline", {"stream": SLOTS}),
        ("packed", "tensor", {}),
        ("gguf", "experts", {}),
        ("gguf", "experts", {"stream": SLOTS}),
        ("gguf", "tensor", {}),
        ("hf", "tensor", {"stream": SLOTS}),
        ("hf", "experts", {"kv_form": KVFormat(8, 32, 4)}),
        ("hf", "pipeline", {"kv_form": KVFormat(8, 32, 4)}),
        ("dense", "tensor", {}),
        ("dense", "pipeline", {}),
    ],
)
def test_shares_of_every_form_are_the_whole(made: dict[str, Path], form: str, kind: str, how: dict[str, Any]) -> None:
    assert len(TOKENS) < FEW < 7 * len(TOKENS)
    models, found = ranked(made[form], PLANS[kind], **how)
    whole = load_model(made[form], **{name: value for name, value in how.items() if name != "stream"})
    assert np.abs(found[0] - read(whole)).max() < 2e-3
    if kind != "pipeline":
        assert np.array_equal(*found)
    if "stream" in how:
        assert any(model.expert_stats and model.expert_stats.bytes_read for model in models)
    for model in (*models, whole):
        model.unload()


def test_memory_is_the_share_and_what_is_repeated(made: dict[str, Path]) -> None:
    def held(model: Any, name: str = "") -> int:
        return sum(array.nbytes for path, array in tree_flatten(model.parameters()) if name in path)

    whole = load_model(made["packed"])
    experts, shared = held(whole, ".mlp.experts."), held(whole, ".shared_expert")
    models, _ = ranked(made["packed"], PLANS["experts"])
    assert held(models[0]) == held(whole) - experts * 3 / 8 - shared
    assert held(models[1]) == held(whole) - experts * 5 / 8 - held(whole, "lm_head")
    pieces, _ = ranked(made["packed"], PLANS["pipeline"])
    assert sum(map(held, pieces)) == held(whole) + whole.norm.weight.nbytes  # which both have


def test_groups_that_ranks_do_not_divide_are_named(made: dict[str, Path]) -> None:
    source = open_source(made["dense"])
    assert indivisible(source.config, source.specs, 2) is None
    assert "num_attention_heads 4" in indivisible(source.config, source.specs, 3)
    narrow = tiny_config("dense", **{**{n: EVEN[n] for n in EVEN if "expert" not in n and "moe" not in n},
                                     "intermediate_size": 96})  # fmt: skip
    folder = write_checkpoint(made["dense"].parent / "n", narrow, random_tensors(narrow))
    source = open_source(convert(folder, made["dense"].parent / "n4", bits=4, group_size=32))
    assert "groups of layers.0.mlp.down_proj" in indivisible(source.config, source.specs, 2)
