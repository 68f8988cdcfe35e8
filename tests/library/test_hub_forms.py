"""What is fetched of repositories in the forms of several publishers: all that a model needs, and nothing more."""

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35 import convert, estimate, load, load_draft_model, load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find, hub_cache
from mlx_qwen35.library.hub import complete_head
from tests import blocks
from tests.checkpoint.forms import config_of, mtp_tensors, oq
from tests.checkpoint.test_forms import in_shards
from tests.checkpoint.test_mtp import write_drafter
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.fake_hub import Hub
from tests.machine import Machine

NAME = "mlx-community/Qwen3.8-tiny-OptiQ-4bit"
STRANGERS = (
    "consolidated.safetensors", "consolidated/model.safetensors", "original/model.safetensors", "optimizer.safetensors",
    "Qwen3.8-tiny-Q4_K_M.gguf", "pytorch_model.bin", "onnx/model.safetensors",
)  # fmt: skip


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def weights(folder: Path) -> set[str]:
    return {name for name in files(folder) if name.endswith(".safetensors")}


def publish(hub: Hub, folder: Path, name: str = NAME) -> Path:
    """With files that belong to other programs, and to no model."""
    for stranger in STRANGERS:
        (folder / stranger).parent.mkdir(exist_ok=True)
        (folder / stranger).write_bytes(b"stranger")
    hub.publish(name, folder)
    return folder


def put_head(folder: Path, place: str, *, raw: bool) -> None:
    (folder / place).parent.mkdir(exist_ok=True)
    head = mtp_tensors(random_tensors(config_of("dense"), 5), "mtp.", raw=raw)
    mx.save_safetensors(str(folder / place), {n: mx.array(v) for n, v in head.items()}, {"format": "mlx"})


def without_head(vision: bool = False):
    form = oq("dense", vision=vision)
    form.arrays = {name: array for name, array in form.arrays.items() if ".mtp." not in name}
    return form


@pytest.mark.parametrize("place", ["optiq_vision.safetensors", "optiq/optiq_vision.safetensors"])
@pytest.mark.parametrize("named", [True, False], ids=["named by the index", "silent"])
def test_optiq(machine: Machine, hub: Hub, place: str, named: bool) -> None:
    source = without_head(vision=True).write(
        machine.home / "a", lambda name: place if name.startswith("vision_tower.") else in_shards(name), index=True
    )
    if not named:
        path = source / "model.safetensors.index.json"
        told = json.loads(path.read_text())
        told["weight_map"] = {n: f for n, f in told["weight_map"].items() if f != place}
        path.write_text(json.dumps(told))
    put_head(source, "optiq/mtp.safetensors", raw=True)
    wanted = weights(source)
    folder = find(NAME) if publish(hub, source) else None
    assert weights(folder) == wanted
    model = load_model(folder)
    assert model.config.vision is not None
    load_mtp(folder, model.config)
    hub.gets.clear()
    assert find(NAME) == folder and hub.gets == []


@pytest.mark.parametrize(
    "place", ["mtp.safetensors", "mtp/weights.safetensors", "mtp/model.safetensors", "heads/mine.safetensors"]
)
def test_heads_in_files_of_their_own(machine: Machine, hub: Hub, place: str) -> None:
    form = without_head()
    if place.startswith("heads"):
        form.config["mlx_lm_extra_tensors"] = {"mtp_file": place}
    source = form.write(machine.home / "a")
    put_head(source, place, raw=False)
    wanted = weights(source)
    publish(hub, source)
    folder = find(NAME)
    assert weights(folder) == wanted
    load_mtp(folder, load_model(folder).config)


@pytest.mark.parametrize("names", [["weights.00.safetensors", "weights.01.safetensors"], ["a.safetensors"]], ids=str)
@pytest.mark.parametrize("index", [True, False])
def test_other_names(machine: Machine, hub: Hub, names: list[str], index: bool) -> None:
    source = oq("dense").write(machine.home / "a", lambda name: names[len(name) % len(names)], index=index)
    publish(hub, source)
    assert weights(find(NAME)) == set(names)
    load_model(find(NAME))


def test_files_that_the_index_does_not_name_stay_there(machine: Machine, hub: Hub) -> None:
    source = oq("dense").write(machine.home / "a", in_shards, index=True)
    wanted = weights(source)
    (source / "model.fp16.safetensors").write_bytes(b"another")
    publish(hub, source)
    assert weights(find(NAME)) == wanted


def test_a_head_is_fetched_when_it_is_asked_for(machine: Machine, hub: Hub) -> None:
    """Other programs download without it, and a snapshot of theirs is whole to them."""
    source = without_head().write(machine.home / "a")
    put_head(source, "optiq/mtp.safetensors", raw=True)
    publish(hub, source)
    folder = find(NAME)
    head = folder / "optiq/mtp.safetensors"
    head.resolve().unlink()
    head.unlink()
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    complete_head(folder)
    assert not head.exists()
    machine.monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.gets.clear()
    seen: list[tuple[int, int]] = []
    complete_head(folder, lambda *at: seen.append(at))
    assert hub.gets == ["optiq/mtp.safetensors"] and seen[-1] == (head.stat().st_size,) * 2
    complete_head(folder)
    complete_head(source)  # no snapshot
    assert hub.gets == ["optiq/mtp.safetensors"]
    load_mtp(folder, load_model(folder).config)


def test_no_head_anywhere(machine: Machine, hub: Hub) -> None:
    publish(hub, without_head().write(machine.home / "a"))
    folder = find(NAME)
    complete_head(folder)
    machine.monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    complete_head(folder)  # whoever asks for it is told that there is none, not that the network is down
    with pytest.raises(CheckpointError, match="has no MTP layer"):
        load_mtp(folder, load_model(folder).config)


def test_an_upload_that_is_not_complete_costs_nothing(machine: Machine, hub: Hub) -> None:
    source = oq("dense").write(machine.home / "a", in_shards, index=True)
    publish(hub, source)
    del hub.repositories[NAME]["model-00002-of-00003.safetensors"]
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003.safetensors, which its .* names"):
        find(NAME)
    del hub.repositories[NAME]["model.safetensors.index.json"]
    with pytest.raises(CheckpointError, match="lacks model-00002-of-00003.safetensors, which their numbers call for"):
        find(NAME)
    assert not list(hub_cache.cache_folder().rglob("*.safetensors"))


def test_a_drafter(machine: Machine, hub: Hub) -> None:
    write_drafter(machine.home / "d", "dense")
    hub.publish("mlx-community/Qwen3.8-tiny-MTP-bf16", machine.home / "d")
    config, _ = write_drafter(machine.home / "e", "dense")
    model = load_model(write_checkpoint(machine.home / "m", config, random_tensors(config)))
    for _ in range(2):  # fetched, then as the cache has it
        load_draft_model("mlx-community/Qwen3.8-tiny-MTP-bf16", model)
    with pytest.raises(CheckpointError, match="a head that drafts for a model. Give that model, and this as"):
        load_model(find("mlx-community/Qwen3.8-tiny-MTP-bf16"))


def test_a_block_drafter(machine: Machine, hub: Hub) -> None:
    """Held against the model by its config.json, before its weights are fetched."""
    drafter = blocks.published()
    hub.publish("z-lab/tiny-DFlash", blocks.write(machine.home / "d", drafter, blocks.tensors(drafter)))
    mine, others = (
        write_checkpoint(machine.home / name, config, random_tensors(config))
        for name, config in (("m", tiny_config()), ("o", tiny_config(vocab_size=97)))
    )
    told = estimate(mine, "8GB", 64, draft_model="z-lab/tiny-DFlash").drafting
    for refused, says in (
        (lambda: load_draft_model("z-lab/tiny-DFlash", load_model(others)), "is for 96 tokens where it has 97"),
        (lambda: estimate(others, "8GB", 64, draft_model="z-lab/tiny-DFlash"), "is for 96 tokens where it has 97"),
        (lambda: estimate("z-lab/tiny-DFlash"), "drafts for another model and answers nothing itself"),
        (lambda: load("z-lab/tiny-DFlash"), "drafts for another model and answers nothing itself"),
    ):
        with pytest.raises(CheckpointError, match=says):
            refused()
    assert not list(hub_cache.cache_folder().rglob("*.safetensors"))
    for _ in range(2):  # fetched, then as the cache has it
        assert load_draft_model("z-lab/tiny-DFlash", load_model(mine)).config.rows == 16
    assert estimate(mine, "8GB", 64, draft_model="z-lab/tiny-DFlash").drafting == told
    assert convert("z-lab/tiny-DFlash", machine.home / "q", group_size=32).is_dir()
