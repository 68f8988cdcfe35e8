"""What convert() writes from every source: its values, a folder as it is laid down, and equal logits in every loader.

The cells are in matrix.py, which runs the whole product as a program.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_qwen35 import convert
from tests.peers import matrix, written
from tests.peers.sources import SOURCES, Shelf

LAYER = "language_model.model.layers.1"


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("sources"))


OFTEN = matrix.some_pairs(18)
SELDOM = [pytest.param(*pair, marks=pytest.mark.soak) for pair in matrix.some_pairs(6) if pair not in OFTEN]


@pytest.mark.parametrize("source, target", [*OFTEN, *SELDOM])
def test_cell(shelf: Shelf, tmp_path: Path, source: str, target: str) -> None:
    matrix.check(shelf[source], matrix.TARGETS[target], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} <= {"out"}


def test_the_part_of_the_product() -> None:
    for at, all_of_them, least in ((0, SOURCES, 2), (1, matrix.TARGETS, 1)):
        met = [cell[at] for cell in OFTEN]
        assert all(met.count(name) >= least for name in all_of_them)


@pytest.mark.parametrize("peer", ["mlx-lm", "mlx-vlm"])
def test_who_answers(peer: str) -> None:
    if peer not in matrix.LOADERS:
        pytest.skip(f"{peer} is not installed: the matrix runs without it")


def tensors(change: Callable[[dict[str, mx.array]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        held = mx.load(str(path))
        change(held)
        mx.eval(list(held.values()))
        mx.save_safetensors(str(path), held, metadata={"format": "mlx"})
        total = sum(value.nbytes for value in held.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(held, path.name)}
        (folder / written.INDEX).write_text(json.dumps(index))

    return damage


def tensor(name: str, change: Callable[[mx.array], mx.array]) -> Callable[[Path], None]:
    return tensors(lambda held: held.update({name: change(held[name])}))


def words(change: Callable[[dict[str, Any]], Any], name: str = "config.json") -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        said = json.loads((folder / name).read_text())
        change(said)
        (folder / name).write_text(json.dumps(said))

    return damage


def quantization(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    return words(lambda config: [change(config[key]) for key in ("quantization", "quantization_config")])


def exchanged(held: dict[str, Any]) -> None:
    for kind in ("weight", "scales", "biases"):
        held[f"{GATE}.{kind}"], held[f"{UP}.{kind}"] = held[f"{UP}.{kind}"], held[f"{GATE}.{kind}"]


def without_vision(held: dict[str, Any]) -> None:
    for name in [name for name in held if name.startswith("vision_tower.")]:
        del held[name]


UP, GATE = (f"{LAYER}.mlp.switch_mlp.{name}_proj" for name in ("up", "gate"))
NORM, KERNEL = f"{LAYER}.self_attn.q_norm.weight", "vision_tower.patch_embed.proj.weight"
WRONG: dict[str, Callable[[Path], Any]] = {
    "a norm that is shifted twice": tensor(NORM, lambda x: x + 1),
    "a row in another place": tensor(f"{UP}.scales", lambda x: x[::-1]),
    "gate and up exchanged": tensors(exchanged),
    "a bit of a weight": tensor(f"{UP}.weight", lambda x: x ^ 1),
    "biases in another dtype": tensor(f"{UP}.biases", lambda x: x.astype(mx.float32)),
    "a norm in another dtype": tensor(NORM, lambda x: x.astype(mx.float32)),
    "a kernel as it was published": tensor(KERNEL, lambda x: x.moveaxis(-1, 1)),
    "MTP among the others": tensors(lambda held: held.update({"mtp.norm.weight": mx.ones(128)})),
    "MTP left out": lambda folder: (folder / written.MTP).unlink(),
    "no vision": tensors(without_vision),
    "a tensor that the index lacks": words(lambda index: index["weight_map"].pop(f"{UP}.weight"), written.INDEX),
    "another total": words(lambda index: index["metadata"].update(total_size=1), written.INDEX),
    "no vision_config": words(lambda config: config.pop("vision_config")),
    "no quantization_config": words(lambda config: config.pop("quantization_config")),
    "no override": quantization(lambda said: said.pop(f"{LAYER}.mlp.gate")),
    "an override of nothing": quantization(lambda said: said.update({f"{UP}x": False})),
    "an override without need": quantization(lambda said: said.update({UP: {"bits": 4, "group_size": 64}})),
    "a size": words(lambda config: config["text_config"].update(max_position_embeddings=1)),
    "something left over": lambda folder: (folder / "model.safetensors.tmp").touch(),
    "no template": lambda folder: (folder / "chat_template.jinja").unlink(),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_wrong_is_noticed(shelf: Shelf, tmp_path: Path, wrong: str) -> None:
    """By the checks of a cell, or they would hold anything for right."""
    source, target = shelf["bf16 experts"], matrix.TARGETS["recipe uniform"]
    out = convert(source.folder, tmp_path / "out", **target.arguments)
    matrix.check_files(out, source, target)
    WRONG[wrong](out)
    with pytest.raises((AssertionError, KeyError, FileNotFoundError)):
        matrix.check_files(out, source, target)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.visual.merger.linear_fc2.bias"])
def test_other_answers_are_noticed(shelf: Shelf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    as_published = written.as_published
    out = convert(shelf["bf16 experts"].folder, tmp_path / "out")
    monkeypatch.setattr(written, "as_published", lambda values: {**(v := as_published(values)), name: v[name] * 1.01})
    with pytest.raises(AssertionError, match="is off by"):
        matrix.check_answers(out, True)
