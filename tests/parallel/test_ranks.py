"""A model on several ranks is the model: on loopback, rank 0 in a process of its own (scene.py)."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conftest import CHECKOUT

BOUND = 2e-3  # of a logit, float32
ODD = {
    "moe": {"num_key_value_heads": 1, "num_attention_heads": 5, "linear_num_key_heads": 3},
    "dense": {"num_key_value_heads": 1},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {}
    for kind, odd in ODD.items():
        config = tiny_config(kind, **odd)
        folder = tmp_path_factory.mktemp(kind)
        made[kind] = write_checkpoint(folder, config, random_tensors(config), shards=2)
    return made


def scene(*words: object) -> dict[str, Any]:
    """What rank 0 saw."""
    command = [sys.executable, "-m", "tests.parallel.scene", *map(str, words)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check_logits(seen: dict[str, Any]) -> None:
    for name in ("whole", "pieces", "steps", "back", "branch", "padded"):
        assert seen[name] <= (0 if seen["plan"] == "pipeline" else BOUND), name
    assert seen["tokens alike"]
    if seen["plan"] != "pipeline":  # every rank has what all have summed
        assert {each["hash"] for each in seen["others"]} == {seen["hash"]}


SOAK = pytest.mark.soak


@pytest.mark.parametrize(
    ("kind", "ranks", "plan"),
    [
        ("moe", 2, "experts"),
        ("dense", 2, "tensor"),
        pytest.param("moe", 3, "experts", marks=SOAK),
        pytest.param("moe", 4, "experts", marks=SOAK),
        pytest.param("moe", 3, "pipeline", marks=SOAK),
        pytest.param("dense", 4, "pipeline", marks=SOAK),
    ],
)
def test_logits_are_those_of_one_process(
    folders: dict[str, Path], kind: str, ranks: int, plan: str
) -> None:
    check_logits(scene("logits", ranks, plan, folders[kind]))


@pytest.mark.parametrize(
    ("ranks", "plan"),
    [
        (2, "pipeline"),
        pytest.param(2, "experts", marks=SOAK),
        pytest.param(3, "experts", marks=SOAK),
        pytest.param(2, "tensor", marks=SOAK),
    ],
)
def test_sessions_pictures_drafts_and_batches_are_those_of_one_process(tmp_path: Path, ranks: int, plan: str) -> None:
    seen = scene("answers", ranks, plan, "demo", tmp_path)
    assert seen["sessions alike"] and seen["batches alike"]
    assert seen["ranked drafted"] == seen["alone drafted"] > 0
    shares = [f"ranked.session.rank{rank}of{ranks}" for rank in range(1, ranks)]
    assert seen["files"] == ["alone.session", "ranked.session", *shares]  # older shares are gone
    assert seen["stored alike"]
    (first, second, third), (_, alone, _) = seen["stored"]["ranked"], seen["stored"]["alone"]
    assert first == third == 0 and second == alone > 64


def test_heads_that_do_not_divide_are_refused_by_name_before_a_weight_is_read(folders: dict[str, Path]) -> None:
    command = [sys.executable, "-m", "tests.parallel.scene", "logits", "2", "tensor", str(folders["moe"])]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
    assert done.returncode != 0
    assert "2 ranks do not divide num_attention_heads 5, linear_num_key_heads 3" in done.stderr
