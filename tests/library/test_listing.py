"""What lies on a machine: each model once, under a name that loads it, and broken ones with their reason."""

import json
import re
from pathlib import Path

import pytest

from mlx_qwen35.cli.main import main
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find, lmstudio
from mlx_qwen35.library.listing import LocalModel, LocalModels, list_models, table
from mlx_qwen35.library.survey import is_ours
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.machine import COMMIT, OTHER_COMMIT, Machine, checkpoint, foreign, gguf

QUANTIZABLE = {
    "hidden_size": 64, "intermediate_size": 128, "linear_num_value_heads": 4, "linear_value_head_dim": 16,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def listed(*folders: Path) -> dict[str, LocalModel]:
    return {model.name: model for model in list_models(*folders)}


def test_a_machine_with_nothing(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ls"]) == 0
    assert "There are no other models. Qwen/Qwen3.5-4B, for example, is downloaded" in capsys.readouterr().err
    assert [model.name for model in list_models()] == ["demo"]
    (demo,) = list_models()
    assert (demo.place, demo.architecture, demo.quantization, demo.vision, demo.mtp) == (
        "the package", "moe", "bf16", True, True,
    )  # fmt: skip
    assert demo.complete and demo.context_length == 4096
    assert demo.nbytes == (demo.folder / "model.safetensors").stat().st_size


def test_what_is_listed(machine: Machine) -> None:
    source = checkpoint(machine.home / "source", text=QUANTIZABLE)
    four = lmstudio.models_folder() / "me" / "Qwen3.5-4bit"
    convert(source, four, bits=4)
    machine.cached("Qwen/Qwen3.5-4B", kind="moe", shards=2)
    machine.cached("Qwen/Qwen3.5-4B", commit=OTHER_COMMIT, revision="v2")
    machine.lmstudio("Qwen/Qwen3.5-2B")
    machine.cached("Qwen/Qwen3.5-2B", dtype="bfloat16")  # the same name twice
    foreign(lmstudio.models_folder() / "meta" / "Llama-3")
    (lmstudio.models_folder() / "empty" / "nothing").mkdir(parents=True)
    models = listed()
    assert list(models) == [
        "demo", "Qwen/Qwen3.5-2B", "me/Qwen3.5-4bit", str(find("Qwen/Qwen3.5-2B@main")), "Qwen/Qwen3.5-4B",
        "Qwen/Qwen3.5-4B@v2",
    ]  # fmt: skip
    for name, model in models.items():
        assert model.complete, model.problem
        assert find(name).samefile(model.folder)
    four_bit = models["me/Qwen3.5-4bit"]
    assert (four_bit.quantization, four_bit.group_size, four_bit.architecture) == ("4-bit", 64, "dense")
    assert 4.5 <= four_bit.bits_per_weight < 9  # tiny: what is not quantized weighs much
    assert models["Qwen/Qwen3.5-4B"].architecture == "moe"
    assert models["Qwen/Qwen3.5-4B"].bits_per_weight == 32
    assert models[str(find("Qwen/Qwen3.5-2B@main"))].quantization == "bf16"


def test_what_cannot_be_loaded_has_a_reason(machine: Machine) -> None:
    models = lmstudio.models_folder()
    cut = machine.lmstudio("me/cut", shards=3)
    (cut / "model-00002-of-00003.safetensors").unlink()
    truncated = machine.lmstudio("me/truncated") / "model.safetensors"
    truncated.write_bytes(truncated.read_bytes()[:-9])
    gguf(models / "unsloth" / "Qwen3.5-9B-GGUF")
    (models / "me" / "Qwen3.5-empty").mkdir()
    (machine.lmstudio("me/Qwen3_5-broken") / "config.json").write_text("{")
    odd = machine.lmstudio("me/odd") / "config.json"
    odd.write_text(json.dumps(json.loads(odd.read_text()) | {"text_config": 7}))
    snapshot = machine.cached("Qwen/Qwen3.5-4B", shards=2)
    (snapshot / "model-00001-of-00002.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").unlink()
    found = listed()
    said = {name: model.problem for name, model in found.items() if not model.complete}
    assert set(said) == {
        "me/cut", "me/truncated", "me/Qwen3.5-empty", "me/Qwen3_5-broken", "me/odd", "unsloth/Qwen3.5-9B-GGUF",
        "Qwen/Qwen3.5-4B",
    }  # fmt: skip
    assert found["me/cut"].missing == ("model-00002-of-00003.safetensors",)
    assert found["me/cut"].context_length == 4096
    assert found["Qwen/Qwen3.5-4B"].missing == ("model-00001-of-00002.safetensors",)
    for name, reason in {
        "me/cut": "1 of 3 shards",
        "me/truncated": "ends early",
        "me/Qwen3.5-empty": "config.json does not exist",
        "me/Qwen3_5-broken": "not valid JSON",
        "me/odd": "text_config is a number",
        "unsloth/Qwen3.5-9B-GGUF": "model-Q4_K_M.gguf ends early",
        "Qwen/Qwen3.5-4B": "lacks 1 of 2 shards",
    }.items():
        assert re.search(reason, said[name]), (name, said[name])
    shown = table(list(found.values()))
    assert all(problem in shown for problem in said.values())
    assert str(list_models()) == shown and "me/cut" in list_models()._repr_html_()


def test_folders_of_ones_own(machine: Machine) -> None:
    folder = machine.home / "models"
    names = [checkpoint(folder / name) for name in ("a", "group/b")]
    foreign(folder / "llama")
    assert [model.folder for model in list_models(folder)][1:] == names
    assert [model.folder for model in list_models(names[0], folder, str(names[0]))][1:] == names  # each once
    with pytest.raises(CheckpointError, match="is no folder"):
        list_models(folder / "no")


def test_a_link_into_the_cache_is_one_model(machine: Machine) -> None:
    snapshot = machine.cached("Qwen/Qwen3.5-4B")
    link = lmstudio.models_folder() / "Qwen" / "linked"
    link.parent.mkdir(parents=True)
    link.symlink_to(snapshot)
    assert list(listed()) == ["demo", "Qwen/linked"]


def test_foreign_quantizations(machine: Machine) -> None:
    config = tiny_config(hidden_size=128, intermediate_size=128)
    config["quantization_config"] = {"quant_method": "hqq", "bits": 4}
    write_checkpoint(lmstudio.models_folder() / "me" / "awq", config, random_tensors(config))
    model = listed()["me/awq"]
    assert model.quantization == "hqq" and "quant_method is 'hqq'" in model.problem


def test_no_weight_is_read(machine: Machine) -> None:
    machine.cached("Qwen/Qwen3.5-4B")
    machine.monkeypatch.setattr("mlx_qwen35.checkpoint.files.read", lambda *a, **k: pytest.fail("a weight is read"))
    assert list_models()[1].complete


def test_the_command(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    machine.cached("Qwen/Qwen3.5-4B")
    gguf(lmstudio.models_folder() / "unsloth" / "Qwen3.5-9B-GGUF")
    extra = checkpoint(machine.home / "extra", kind="moe")
    assert main(["ls", str(extra)]) == 0
    assert "There are no other models" not in (said := capsys.readouterr()).err
    head, *rows = said.out.splitlines()
    assert head.split() == ["NAME", "SIZE", "WEIGHTS", "BITS", "SEES", "MTP", "STREAMS", "CONTEXT", "PLACE"]
    assert len({row.index("4,096") for row in rows if "4,096" in row}) == 1  # columns stand under each other
    assert sum("cannot be loaded" in row for row in rows) == 1
    assert main(["ls", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert records["Qwen/Qwen3.5-4B"]["complete"] and records["Qwen/Qwen3.5-4B"]["folder"].endswith(COMMIT)
    assert records["unsloth/Qwen3.5-9B-GGUF"]["complete"] is False
    assert main(["ls", "no/such/folder"]) == 2


@pytest.mark.parametrize(
    "name, ours",
    [
        ("Qwen/Qwen3.5-4B", True), ("Qwen/Qwen3.6-27B", True), ("mlx-community/Qwen3.8-27B-4bit", True),
        ("me/qwen3_8-27b", True), ("me/Qwen38-27B", True), ("Qwen/Qwen3.8-2.4T-A95B-FP8", True),
        ("Qwen/Qwen3-8B", False), ("Qwen/Qwen3-8b-MLX-4bit", False), ("Qwen/Qwen3-5B", False),
        ("Qwen/Qwen3.7-Max", False), ("Qwen/Qwen3.8-Flash-Next", False), ("Qwen/Qwen3.85-1B", False),
        ("Qwen/Qwen3-VL-8B", False),
    ],
)  # fmt: skip
def test_families_by_name(tmp_path: Path, name: str, ours: bool) -> None:
    """Of a folder without config.json only its name tells."""
    assert is_ours(tmp_path, name) is ours


def test_none_here_names_the_family(machine: Machine) -> None:
    assert str(LocalModels()) == "No Qwen3.5, 3.6 or 3.8 on this machine."
