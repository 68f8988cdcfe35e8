"""Our logits against transformers' for random models of many shapes: whole, in chunks, token by token, padded.

Knows the vectors that make_golden.py wrote, and the public calls of the package. Needs no torch.
"""

import json
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import load_model
from tests import figures
from tests.checkpoints import random_tensors, write_checkpoint

HERE = Path(__file__).resolve().parent
CASES = json.loads((HERE / "cases.json").read_text())["cases"]


class Golden(NamedTuple):
    model: Any
    ids: mx.array  # [1, T]
    logits: np.ndarray  # [T, vocab]


@pytest.fixture(scope="module", params=CASES)
def golden(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Golden:
    case = CASES[request.param]
    tensors = random_tensors(case["config"], case["seed"])
    total = sum(np.abs(v, dtype=np.float64).sum() for v in tensors.values())
    assert total == pytest.approx(case["checksum"], rel=1e-6), "the weights are not those the vectors were made with"
    folder = write_checkpoint(tmp_path_factory.mktemp("golden"), case["config"], tensors, shards=2)
    with np.load(HERE / f"{request.param}.npz") as vectors:
        return Golden(load_model(folder), mx.array(vectors["ids"])[None], vectors["logits"])


def worst(logits: mx.array, expected: np.ndarray) -> float:
    assert logits.shape == expected.shape
    return float(np.abs(np.array(logits.astype(mx.float32)) - expected).max())


def in_chunks(golden: Golden, lengths: list[int], tokens: int) -> mx.array:
    """Logits [tokens, vocab] through one cache, the chunks being as long as `lengths` says, over and over."""
    cuts = [0]
    for length in cycle(lengths):
        cuts.append(min(cuts[-1] + length, tokens))
        if cuts[-1] == tokens:
            break
    cache = golden.model.make_cache()
    parts = []
    for start, stop in pairwise(cuts):
        parts.append(golden.model(golden.ids[:, start:stop], cache)[0])
        mx.eval(parts[-1], cache.arrays())
    assert cache.offset == tokens
    return mx.concatenate(parts)


def test_whole(golden: Golden) -> None:
    figures.hold(figures.WHOLE, worst(golden.model(golden.ids)[0], golden.logits))


@pytest.mark.parametrize("lengths", [[1, 2, 7, 63], [64], [3, 65, 5]], ids=str)
def test_in_chunks(golden: Golden, lengths: list[int]) -> None:
    tokens = golden.ids.shape[1]
    figures.hold(figures.WHOLE, worst(in_chunks(golden, lengths, tokens), golden.logits))


def test_token_by_token(golden: Golden) -> None:
    tokens = min(golden.ids.shape[1], 70)
    figures.hold(figures.WHOLE, worst(in_chunks(golden, [1], tokens), golden.logits[:tokens]))


def test_left_padded_batch(golden: Golden) -> None:
    """Rows of unequal length, padded on the left, prefilled together and then stepped on together."""
    steps, lengths = 3, [29, 1, 40, 17]
    width = max(lengths)
    padding = [width - n for n in lengths]
    # tokens of the rows, length 3 and 5:   . . 1 2 3 | 4      "." is padding: any token, no influence
    #                                       1 2 3 4 5 | 6
    rows = [[7] * pad + golden.ids[0, : n + steps].tolist() for pad, n in zip(padding, lengths, strict=True)]
    batch = mx.array(rows)  # [B, width + steps]
    cache = golden.model.make_cache(batch=len(rows), left_padding=padding)
    logits = [golden.model(batch[:, :width], cache)]
    logits += [golden.model(batch[:, i : i + 1], cache) for i in range(width, width + steps)]
    together = mx.concatenate(logits, axis=1)  # [B, width + steps, vocab]
    for row, pad in enumerate(padding):
        figures.hold(figures.PADDED, worst(together[row, pad:], golden.logits[: width + steps - pad]))
