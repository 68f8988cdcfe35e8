"""A LoRA adapter on ranks: each has its share, and together they are the model with the adapter."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35 import convert
from mlx_qwen35.checkpoint.adapters import EMBEDDING, fuse, load_adapter, put_on, read_adapter, save_adapter
from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.parallel.adapted import adapter_identity
from mlx_qwen35.parallel.plan import Plan
from mlx_qwen35.parallel.share import RankShare
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

from .test_forms import EVEN, PLANS, read
from .threads import Meeting, Threads, together

pytest.importorskip("mlx_lm.tuner.lora", reason="mlx-lm is not installed")
WHOLE_WEIGHTS = ("o_proj.weight", "k_proj.weight", "conv1d.weight", "dt_bias", "experts.up_proj.weight", "norm.weight")
RANK = 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapted")
    dense = {name: EVEN[name] for name in EVEN if "expert" not in name and "moe" not in name}
    found = {}
    for kind, sizes in (("moe", EVEN), ("dense", dense | {"intermediate_size": 128})):
        config = tiny_config(kind, **sizes)
        found[kind] = write_checkpoint(made / kind, config, random_tensors(config))
    return found | {"packed": convert(found["moe"], made / "packed", bits=4, group_size=32)}


def written(folder: Path, config: ModelConfig, kind: str) -> Path:
    """An adapter of every module that takes one."""
    rng, tensors = np.random.RandomState(4), {}

    def values(*shape: int) -> mx.array:
        return mx.array(rng.standard_normal(shape).astype(np.float32) * 0.1)

    for name, shape in text_tensors(config).items():
        if kind == "full" and name.endswith(WHOLE_WEIGHTS):
            tensors[name] = values(*shape)
        if kind == "full" or not is_linear(name, shape) or (kind == "dora" and len(shape) > 2):
            continue
        module, (*experts, outer, inner) = name.removesuffix(".weight"), shape
        if experts:
            a, b = (*experts, RANK, inner), (*experts, outer, RANK)
        else:
            a, b = ((outer, RANK), (RANK, inner)) if module == EMBEDDING else ((inner, RANK), (RANK, outer))
        tensors |= {f"{module}.lora_a": values(*a), f"{module}.lora_b": values(*b)}
        if kind == "dora":
            tensors[f"{module}.m"] = 1 + mx.abs(values(outer))
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), tensors)
    parameters = {"rank": RANK, "scale": 2.0, "dropout": 0.0}
    (folder / "adapter_config.json").write_text(json.dumps({"fine_tune_type": kind, "lora_parameters": parameters}))
    return folder


@pytest.mark.parametrize(
    ("form", "plan", "kind"),
    [
        ("moe", "experts", "lora"),
        ("moe", "pipeline", "dora"),
        ("moe", "tensor", "lora"),
        ("moe", "tensor", "full"),
        ("moe", "experts", "full"),
        ("packed", "experts", "dora"),
        ("packed", "tensor", "lora"),
        ("dense", "tensor", "lora"),
    ],
)
def test_shares_of_an_adapter_are_the_whole(
    folders: dict[str, Path], tmp_path: Path, form: str, plan: str, kind: str
) -> None:
    meeting, config = Meeting(2), open_source(folders[form]).config
    adapter = read_adapter(written(tmp_path / "adapter", config, kind))
    models = []
    for rank in range(2):
        share = RankShare(config, PLANS[plan], Threads(rank, 2, meeting))
        models.append(put_on(load_model(folders[form], share=share), share.adapter(adapter)))
        mx.eval(models[-1].parameters())
    found = together([lambda model=model: read(model) for model in models])
    plain = load_model(folders[form])
    without = read(plain)
    right = read(load_adapter(plain, adapter))
    assert np.abs(found[0] - right).max() < 2e-3 < np.abs(without - right).max()
    if plan != "pipeline":
        assert np.array_equal(*found)


def test_what_a_rank_cannot_do_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    config = open_source(folders["dense"]).config
    adapter = read_adapter(written(tmp_path / "a", config, "dora"))

    def share(plan: str) -> RankShare:
        return RankShare(config, PLANS[plan], Threads(1, 2, Meeting(2)))

    with pytest.raises(CheckpointError, match=r"DoRA, which needs whole rows of layers.*take the plan experts"):
        share("tensor").adapter(adapter)
    part = share("pipeline").adapter(adapter)
    assert {name.split(".")[1] for name in part.tensors if name != EMBEDDING} == {"1", "2", "3"}
    model: Any = load_model(folders["dense"])
    model.__class__ = type("Leader", (type(model),), {"ranks_told": {"ranks": "2 pipeline"}})
    for refused in (lambda: load_adapter(model, adapter), lambda: fuse(model), lambda: save_adapter(model, tmp_path)):
        with pytest.raises(CheckpointError, match="take an adapter when they load"):
            refused()
    with pytest.raises(CheckpointError, match="trained on another model"):
        RankShare(open_source(folders["moe"]).config, Plan("experts", ((0, 8),), (), (), 0.0),
                  Threads(0, 1, Meeting(1))).adapter(adapter)  # fmt: skip


def test_copies_of_an_adapter_are_one(folders: dict[str, Path], tmp_path: Path) -> None:
    config = open_source(folders["dense"]).config
    made = [read_adapter(written(tmp_path / name, config, kind)) for name, kind in
            (("a", "lora"), ("b", "lora"), ("c", "dora"))]  # fmt: skip
    one, copy, other = map(adapter_identity, made)
    assert one == copy != other
