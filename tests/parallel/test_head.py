"""The head of the tensor plan: each rank its rows, and of the logits the largest alone are sent."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import convert
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.parallel.cuts import vocabulary_span
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.parallel.share import RankShare
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

from .test_forms import EVEN, TOKENS
from .threads import Meeting, Threads, together

SIZES = {name: EVEN[name] for name in EVEN if "expert" not in name and "moe" not in name} | {"intermediate_size": 128}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made, found = tmp_path_factory.mktemp("heads"), {}
    for name, tied, vocabulary in (("tied", True, 96), ("untied", False, 97), ("large", False, 700)):
        config = tiny_config("dense", **SIZES | {"vocab_size": vocabulary}, tie_word_embeddings=tied)
        found[name] = write_checkpoint(made / name, config, random_tensors(config))
    return found | {"4 bits": convert(found["large"], made / "packed", bits=4, group_size=32)}


def ranked(folder: Path, ranks: int = 2) -> list[RanksModel]:
    meeting, config = Meeting(ranks), open_source(folder).config
    plan = Plan("tensor", tuple((rank, rank + 1) for rank in range(ranks)), (), (), 0.0)
    models = [load_model(folder, share=RankShare(config, plan, Threads(rank, ranks, meeting))) for rank in range(ranks)]
    for model in models:
        mx.eval(model.parameters())
    return models


@pytest.mark.parametrize("count", [1, 5, 40])
@pytest.mark.parametrize("form", ["tied", "untied", "large", "4 bits"])
def test_the_largest_logits_of_all_ranks_are_those_of_the_model(
    folders: dict[str, Path], form: str, count: int
) -> None:
    models, whole = ranked(folders[form]), load_model(folders[form])
    vocabulary = whole.config.text.vocab_size
    tokens = vocabulary - 3  # the others stand for none
    rows = mx.array([TOKENS, TOKENS[::-1], [*TOKENS[3:], *TOKENS[:3]]])
    together([lambda m=model: m.computed(rows, None, (), more=False, best=(count, tokens)) for model in models])
    right = np.array(whole(rows)[:, -1, :tokens])
    order = np.argsort(-right, axis=-1, kind="stable")[:, :count]
    found = [[np.array(part) for part in model.best] for model in models]
    for values, ids in found:
        assert np.array_equal(np.sort(ids, axis=-1), np.sort(order, axis=-1))
        assert np.abs(np.take_along_axis(right, ids.astype(int), axis=-1) - values).max() < 1e-3
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))
    layers, hidden = whole.config.text.num_hidden_layers, whole.config.text.hidden_size
    traffic = models[0].group.traffic
    assert traffic.messages == 2 * layers + 1
    assert traffic.nbytes == 4 * (2 * layers * rows.size * hidden + len(rows) * 2 * 2 * count)


def test_what_a_rank_holds_of_the_head(folders: dict[str, Path]) -> None:
    first, second = ranked(folders["untied"])
    assert first.lm_head.weight.shape[0] == 97 and second.lm_head.weight.shape[0] == 49
    assert "lm_head" not in ranked(folders["tied"])[1]
    assert first.cuts_head


@pytest.mark.parametrize(("count", "ranks"), [(97, 2), (248320, 3), (40, 4), (7, 2), (512, 4)])
def test_spans_cover_the_vocabulary(count: int, ranks: int) -> None:
    spans = [vocabulary_span(count, ranks, rank) for rank in range(ranks)]
    assert spans[0][0] == 0 and spans[-1][1] == count
    assert all(a[1] == b[0] for a, b in zip(spans, spans[1:], strict=False))
    assert all(first < stop for first, stop in spans)
