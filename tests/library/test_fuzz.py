"""Names and folders that nobody meant: a clear error or a line with a reason, never anything else."""

import json
import random
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import lmstudio
from mlx_qwen35.library.finding import HubName, look_up
from mlx_qwen35.library.listing import list_models, table
from mlx_qwen35.library.stored import Stored
from tests.checkpoints import tiny_config
from tests.machine import Machine, checkpoint
from tests.soak import examples

ODD = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PIECES = (
    "qwen3.5",
    "Qwen",
    "/",
    "@",
    "4bit",
    "-",
    ".",
    "~",
    "..",
    "\\",
    "main",
    "a",
    " ",
    "\n",
    "é",
    "\0",
    "mlx",
    "C:",
)


@settings(max_examples=examples(300))
@given(st.lists(st.sampled_from(PIECES), max_size=7).map("".join) | st.text(max_size=12))
def test_any_text_is_a_model_a_hub_name_or_an_error(name: str) -> None:
    try:
        assert isinstance(look_up(name), Stored | HubName)
    except CheckpointError as error:
        assert str(error)


def damaged(config: Any, chosen: random.Random, odd: list[Any]) -> Any:
    """The same with a few values replaced."""
    if isinstance(config, dict):
        return {key: damaged(value, chosen, odd) for key, value in config.items() if chosen.random() > 0.02}
    return chosen.choice(odd) if chosen.random() < 0.06 else config


def test_damaged_configurations_are_listed(machine: Machine) -> None:
    odd: list[Any] = [None, [], {}, "x", -1, 2**70, 1.5, [[1]], {"bits": [1]}, {"quant_method": []}, True]
    chosen = random.Random(5)
    for number in range(150):
        config: dict[str, Any] = tiny_config(vision=True)
        config["quantization"] = {"bits": 4, "group_size": 64}
        config["quantization_config"] = {"quant_method": chosen.choice(["fp8", "gptq"]), "bits": 4}
        if number % 2:
            del config["quantization"]
        folder = lmstudio.models_folder() / "fuzz" / f"Qwen3.5-{number}"
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(damaged(config, chosen, odd)))
        (folder / "model.safetensors").write_bytes(chosen.randbytes(chosen.randrange(40)))
    models = list_models()
    broken = [model for model in models if model.place == "LM Studio"]
    assert len(broken) > 100 and all(model.problem for model in broken)
    assert table(models)
    for number in range(150):
        try:
            look_up(f"qwen3.5-{number}")
        except CheckpointError:
            continue


@settings(max_examples=examples(40))
@given(ODD)
def test_any_json_in_lm_studios_files(value: Any) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        machine = Machine(Path(folder) / "home", patch)
        patch.chdir(folder)  # where a damaged downloadsFolder may lead
        (machine.home / ".lmstudio").mkdir()
        (machine.home / ".lmstudio" / "settings.json").write_text(json.dumps(value))
        machine.catalogue("me/odd", json.dumps({"base": value}))
        checkpoint(lmstudio.models_folder() / "me" / "Qwen3.5-2B")
        assert isinstance(look_up("qwen3.5-2b"), Stored)
