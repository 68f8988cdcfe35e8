"""A machine with every form that is read, in every place: each listed with what it weighs, and what it can."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGUFReader

from mlx_qwen35.cli.main import main
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.library import find, hub_cache, lmstudio
from mlx_qwen35.library.listing import ADAPTER, LocalModel, list_models
from tests import blocks
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.checkpoint.forms import oq
from tests.checkpoint.gguf.building import config_of, matrices, tiny_tokenizer, write_gguf
from tests.checkpoint.published import FFN, FORMS, SIZES, write
from tests.checkpoint.test_hadamard import publish as write_bonsai
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.library.test_gguf import tower
from tests.machine import COMMIT, Machine

# What publishers put beside weights and that says nothing of them.
PASSED_BY = (".weight_shape", ".input_scale", ".input_global_scale", ".weight_format", ".rotary_emb.inv_freq")


@dataclass(frozen=True)
class Kind:
    """A form. write: into a folder, given; told: in the column WEIGHTS; can: whether it sees, drafts, streams."""

    write: Callable[[Path], Any]
    told: str
    can: tuple[bool, bool, bool]


def converted(**how: Any) -> Callable[[Path], Any]:
    def write_it(folder: Path) -> None:
        config = tiny_config("moe", vision=True, **SIZES | FFN["moe"])
        source = write_checkpoint(folder.with_name("source-of-" + folder.name), config, random_tensors(config))
        convert(source, folder, recipe="uniform", **how)
        for path in source.iterdir():
            path.unlink()
        source.rmdir()

    return write_it


def gguf(name: str, kind: str, blocks: str, *, sees: bool = False, split: int = 0) -> Callable[[Path], Any]:
    def write_it(folder: Path) -> None:
        folder.mkdir(parents=True)
        config = config_of(kind, mtp_num_hidden_layers=1)
        tensors = random_tensors(config)
        write_gguf(folder / name, config, tensors, matrices(blocks), tokenizer=tiny_tokenizer(), split=split)
        if sees:
            tower(folder / "mmproj-F16.gguf")

    return write_it


def plain(folder: Path) -> None:
    config = tiny_config("dense", vision=True, mtp_num_hidden_layers=1)
    write_checkpoint(folder, config, random_tensors(config), dtype="bfloat16")


NO, STREAMS = (False, False, False), (False, False, True)
KINDS = {
    "BF16": Kind(plain, "bf16", (True, True, False)),
    "MLX-4bit": Kind(converted(bits=4, group_size=32), "4-bit", (True, False, True)),
    "MLX-mxfp4": Kind(converted(mode="mxfp4"), "mxfp4", (True, False, True)),
    "MLX-nvfp4": Kind(converted(mode="nvfp4"), "nvfp4", (True, False, True)),
    "oQ4": Kind(lambda folder: oq("moe", vision=True).write(folder), "4-bit", (True, True, True)),
    "FP8": Kind(write_fp8, "fp8", (True, True, False)),
    "GPTQ-Int4": Kind(write_gptq, "gptq 4-bit", (True, True, False)),
    "Q4_K_M-GGUF": Kind(gguf("a-Q4_K_M.gguf", "dense", "Q4_K"), "gguf Q4_K", (False, True, False)),
    "sees-GGUF": Kind(gguf("a-Q8_0.gguf", "dense", "Q8_0", sees=True), "gguf Q8_0", (True, True, False)),
    "split-GGUF": Kind(gguf("a-IQ2_XXS.gguf", "moe", "IQ2_XXS", split=25), "gguf IQ2_XXS", (False, True, True)),
    "MXFP4-GGUF": Kind(gguf("a-MXFP4_MOE.gguf", "moe", "MXFP4"), "gguf MXFP4", (False, True, True)),
    "Ternary-Bonsai": Kind(write_bonsai, "2-bit", NO),
    **{
        name: Kind(lambda folder, form=form: write(folder, form), "", STREAMS if form.streams else NO)
        for name, form in FORMS.items()
    },
}  # fmt: skip
PLACES = ("LM Studio", "Hugging Face cache", "folder")


def put(machine: Machine, number: int, name: str) -> tuple[str, Path]:
    """(what to load it by, its folder) in one of the places, which take turns."""
    model = "Qwen3.6-" + name.replace(", ", "-").replace(" ", "-")
    place = PLACES[number % 3]
    if place == "LM Studio":
        return f"me/{model}", lmstudio.models_folder() / "me" / model
    if place == "folder":
        return str(machine.home / "mine" / model), machine.home / "mine" / model
    repository = hub_cache.cache_folder() / f"models--me--{model}"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    return f"me/{model}", repository / "snapshots" / COMMIT


@pytest.fixture
def full(machine: Machine) -> dict[str, tuple[str, Path]]:
    """Kind -> (name, folder)."""
    made = {}
    for number, (name, kind) in enumerate(KINDS.items()):
        made[name] = put(machine, number, name)
        made[name][1].parent.mkdir(parents=True, exist_ok=True)
        kind.write(made[name][1])
    return made


def stored_bytes(folder: Path) -> int:
    """Of all tensors but those of an MTP layer, by what the files say."""
    total = 0
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        told = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        for name, tensor in told.items():
            if name != "__metadata__" and not name.endswith(PASSED_BY) and "mtp." not in name:
                begin, end = tensor["data_offsets"]
                total += end - begin
    for path in folder.glob("*.gguf"):
        total += sum(int(t.n_bytes) for t in GGUFReader(path).tensors if not t.name.startswith("blk.2."))
    return total


def weights(folder: Path, name: str) -> int:
    """Of the model as it was before anything was quantized, without an MTP layer."""
    if list(folder.glob("*.gguf")):
        kind = "moe" if name.startswith(("split", "MXFP4")) else "dense"
        count = sum(v.size for n, v in random_tensors(config_of(kind)).items() if not n.startswith("mtp."))
        tensors = GGUFReader(folder / "mmproj-F16.gguf").tensors if name.startswith("sees") else ()
        return count + sum(math.prod(int(n) for n in tensor.shape) for tensor in tensors)
    config = json.loads((folder / "config.json").read_text())
    if "modules" in config:
        config["model_type"] = "qwen3_5"
    return sum(value.size for n, value in random_tensors(config).items() if not n.startswith("mtp."))


def test_every_form(machine: Machine, full: dict[str, tuple[str, Path]], capsys: pytest.CaptureFixture[str]) -> None:
    mine = machine.home / "mine"
    listed = {model.name: model for model in list_models(mine)}
    assert set(listed) == {"demo", *(name for name, _ in full.values())}
    for kind, (name, folder) in full.items():
        model: LocalModel = listed[name]
        assert model.complete, (kind, model.problem)
        assert model.parameters == weights(folder, kind), kind
        assert model.bits_per_weight == pytest.approx(8 * stored_bytes(folder) / model.parameters, rel=1e-9), kind
        assert (model.vision, model.mtp, model.streams) == KINDS[kind].can, kind
        assert KINDS[kind].told in model.quantization, kind
        assert find(name) == model.folder or find(name) == folder, kind
        assert model.place in PLACES
    assert main(["ls", str(mine)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 1 + len(listed)
    for line in shown[1:]:
        model = next(m for n, m in listed.items() if line.startswith(f"{n} "))
        cells = line[len(model.name) :].split()
        assert f"{model.bits_per_weight:.2f}" in cells
        flags = ["yes" if flag else "no" for flag in (model.vision, model.mtp, model.streams)]
        assert any(cells[n : n + 3] == flags for n in range(len(cells)))
    assert main(["ls", "--json", str(mine)]) == 0
    records = json.loads(capsys.readouterr().out)
    assert {record["name"]: record["streams"] for record in records} == {n: m.streams for n, m in listed.items()}


@pytest.mark.parametrize("by_name", [True, False])
def test_adapters(machine: Machine, capsys: pytest.CaptureFixture[str], by_name: bool) -> None:
    """Of PEFT and of mlx-lm: with what they go with, by their names or by what they say."""
    peft, mlx = ("adapter_model.safetensors", "base_model_name_or_path"), ("adapters.safetensors", "model")
    for maker, (file, key) in {"peft": peft, "mlx": mlx}.items():
        folder = machine.home / "mine" / (f"Qwen3.5-{maker}" if by_name else maker)
        folder.mkdir(parents=True)
        told = {"peft_type": "LORA"} if by_name else {key: "Qwen/Qwen3.5-4B"}
        (folder / "adapter_config.json").write_text(json.dumps(told))
        mx.save_safetensors(str(folder / file), {"a": mx.array(np.ones(4, np.float32))})
    other = machine.home / "mine" / "other"
    other.mkdir()
    (other / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "meta/Llama-3"}))
    (other / "adapter_model.safetensors").write_bytes(b"")
    found = list_models(machine.home / "mine")[1:]
    assert len(found) == 2
    for model in found:
        assert model.quantization == ADAPTER and not model.complete and model.bits_per_weight is None and model.nbytes
        base = "a model" if by_name else "Qwen/Qwen3.5-4B"
        assert model.problem == f"goes with {base}, as --adapter-path {model.folder}"
    assert main(["ls", str(machine.home / "mine")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("    goes with") == 2 and "cannot be loaded" not in shown


def test_block_drafters(machine: Machine) -> None:
    """Those of the family, by their tokens or their names; what else says "qwen3" is of another."""
    told = blocks.published()
    for name, config in (
        ("Qwen3.8-tiny-DFlash", told),
        ("few-bits", {**told, "vocab_size": 248320}),
        ("Qwen3.8-DSpark", {**told, "architectures": ["DSparkDraftModel"]}),
        ("GLM-DFlash", told),
    ):
        blocks.write(machine.home / "d" / name, config, {})
    (machine.home / "d" / "few-bits" / "model.safetensors").unlink()
    found = {Path(model.name).name: model for model in list_models(machine.home / "d") if model.name != "demo"}
    assert found.keys() == {"Qwen3.8-tiny-DFlash", "few-bits", "Qwen3.8-DSpark"}
    assert {model.quantization for model in found.values()} == {"drafter"}
    problems = {name: model.problem for name, model in found.items()}
    assert (
        "a DFlash drafter for a model of 4 layers and hidden size 64, as --draft-model "
        in problems["Qwen3.8-tiny-DFlash"]
    )
    assert "it lacks model.safetensors" in problems["few-bits"]
    assert "that of a DSpark drafter, which this package does not compute" in problems["Qwen3.8-DSpark"]
