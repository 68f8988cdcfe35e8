"""GGUFs on the Hub: the one that is named, of it what is needed, and nothing before its header says that it will do."""

from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import pytest

import mlx_qwen35
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import find, hub_cache, hub_gguf, lmstudio
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.finding import HubName, look_up
from mlx_qwen35.library.hub import complete_head
from mlx_qwen35.library.listing import list_models
from tests.checkpoint.gguf.building import config_of, write_gguf
from tests.checkpoints import random_tensors
from tests.fake_hub import Hub
from tests.library.test_gguf import tower, written
from tests.machine import COMMIT, Machine, checkpoint

NAME = "unsloth/Qwen3.5-tiny-GGUF"
LARGE = "UD-Q5_K_XL/Qwen3.5-tiny-UD-Q5_K_XL"


@pytest.fixture(scope="module")
def uploaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two single files, a split one in a folder of its own, two towers, and what is no model."""
    folder = tmp_path_factory.mktemp("published")
    written(folder / "Qwen3.5-tiny-Q4_K_M.gguf", blocks="Q4_K")
    written(folder / "Qwen3.5-tiny-Q8_0.gguf")
    written(folder / f"{LARGE}.gguf", "moe", "Q5_K", split=20)
    for kind in ("F16", "BF16"):
        tower(folder / f"mmproj-{kind}.gguf")
    (folder / "imatrix.gguf").write_bytes(b"GGUF")
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("Qwen")
    return folder


@pytest.fixture
def published(hub: Hub, uploaded: Path) -> Path:
    hub.publish(NAME, uploaded)
    return uploaded


def parts(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.glob("UD*/*.gguf"))


def inside(path: Path) -> set[str]:
    snapshot = hub_cache.snapshot(NAME)
    assert path.is_relative_to(snapshot)
    return {p.relative_to(snapshot).as_posix() for p in snapshot.rglob("*") if not p.is_dir()}


@pytest.mark.parametrize(
    "ref",
    [f"{NAME}:Q4_K_M", f"{NAME}:q4_k_m", f"{NAME}@q4_k_m", f"{NAME}@main:Q4_K_M", f"{NAME}/Qwen3.5-tiny-Q4_K_M.gguf",
     f"https://huggingface.co/{NAME}/blob/main/Qwen3.5-tiny-Q4_K_M.gguf?download=true", f"hf.co/{NAME}:Q4_K_M",
     f"{NAME}:Qwen3.5-tiny-Q4_K_M.gguf", f"{NAME}@{COMMIT}:Q4_K_M"],
)  # fmt: skip
def test_one_of_several(machine: Machine, hub: Hub, published: Path, ref: str) -> None:
    """By its quantization or its name; with its vision tower, and nothing else. Then it is here."""
    path = find(ref)
    assert path.name == "Qwen3.5-tiny-Q4_K_M.gguf" and inside(path) == {path.name, "mmproj-BF16.gguf"}
    assert hub.gets == ["mmproj-BF16.gguf", path.name]
    assert path.read_bytes() == (published / path.name).read_bytes()
    hub.gets.clear()
    hub.begun.clear()
    if f"@{COMMIT}" not in ref:
        machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert find(ref) == find(NAME) == find("qwen3.5-tiny:q4_k_m") == path
    assert find(ref) == path and not hub.gets and not hub.begun


def test_it_answers_and_sees(hub: Hub, published: Path) -> None:
    model, processor = mlx_qwen35.load(f"{NAME}:Q8_0")
    assert model.config.vision is not None and processor.encode("hello")
    wanted = mlx_qwen35.load_model(published / "Qwen3.5-tiny-Q8_0.gguf")(mx.array([[1, 2, 3]]))
    assert mx.array_equal(model(mx.array([[1, 2, 3]])), wanted).item()


def test_a_split_one_in_a_folder(machine: Machine, hub: Hub, published: Path) -> None:
    """Q5_K_XL is UD-Q5_K_XL where there is no other. The tower lies above; a file that is lost is fetched again."""
    names = parts(published)
    assert len(names) > 2
    path = find(f"{NAME}:Q5_K_XL")
    assert path.name.endswith(f"-00001-of-0000{len(names)}.gguf")
    assert inside(path) == {*names, "mmproj-BF16.gguf"}
    assert mlx_qwen35.load_model(path).config.vision is not None
    (lost := path.with_name(Path(names[1]).name)).resolve().unlink()
    lost.unlink()
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="is incomplete, and HF_HUB_OFFLINE forbids"):
        find(f"{NAME}:UD-Q5_K_XL")
    machine.monkeypatch.delenv("HF_HUB_OFFLINE")
    hub.gets.clear()
    assert find(f"{NAME}:UD-Q5_K_XL") == find(f"{NAME}/{names[1]}") == path
    assert hub.gets == [names[1]]


def test_what_is_said_of_several_and_of_none(hub: Hub, published: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        find(NAME)
    said = str(error.value)
    assert "holds 3 GGUFs: give one of these names" in said and said.count("MB") + said.count("GB") == 3
    assert f"{NAME}:Q4_K_M" in said and f"{NAME}:UD-Q5_K_XL" in said and "mmproj" not in said and "imatrix" not in said
    for ref in (f"{NAME}:Q2_K", f"{NAME}@q2_k", f"{NAME}/none.gguf"):
        with pytest.raises(CheckpointError, match="(?s)has no GGUF .*It has:.*:Q4_K_M"):
            find(ref)
    with pytest.raises(CheckpointError, match="has no revision 'v9'"):
        find(f"{NAME}@v9:Q8_0")
    del hub.repositories[NAME][parts(published)[1]]
    with pytest.raises(CheckpointError, match="lacks .*-00002-of-.*upload is not complete"):
        find(f"{NAME}:UD-Q5_K_XL")
    assert not hub.gets and look_up(f"{NAME}:Q8_0") == HubName(NAME, None, "Q8_0")


def test_a_header_is_enough_to_refuse_and_to_estimate(machine: Machine, hub: Hub, published: Path) -> None:
    with pytest.raises(CheckpointError, match="does not fit into the 20.0 MB"):
        mlx_qwen35.load(f"{NAME}:Q8_0", memory="20MB")
    for ref, name in ((f"{NAME}:Q8_0", "Qwen3.5-tiny-Q8_0.gguf"), (f"{NAME}:UD-Q5_K_XL", parts(published)[0])):
        there, here = (estimate(r, memory="24GB", probe=True) for r in (ref, published / name))
        assert (there.weights, there.loading, there.quantization) == (here.weights, here.loading, here.quantization)
        assert there.name == ref
    assert not hub.gets and hub_cache.snapshot(NAME) is None
    assert not list(machine.home.glob("tmp*")) and max(size for _, size in hub.begun) <= 12 << 20


def test_headers_longer_than_they_were_thought(machine: Machine, hub: Hub, published: Path) -> None:
    machine.monkeypatch.setattr(hub_gguf, "_FIRST_READ", 500)
    machine.monkeypatch.setattr(hub_gguf, "_OTHER_READ", 100)
    assert estimate(f"{NAME}:Q8_0", memory="24GB").quantization == "gguf Q8_0"
    counts = [size for name, size in hub.begun if name == "Qwen3.5-tiny-Q8_0.gguf"]
    assert counts[0] == 500 and all(b == 2 * a for a, b in zip(counts, counts[1:], strict=False)) and len(counts) > 2


def test_another_family_costs_its_header(hub: Hub, published: Path) -> None:
    data = hub.repositories[NAME]["Qwen3.5-tiny-Q8_0.gguf"]
    hub.repositories["me/Llama-GGUF"] = {"a-Q8_0.gguf": data.replace(b"qwen35", b"llama3", 1)}
    with pytest.raises(CheckpointError, match="me/Llama-GGUF on the Hugging Face Hub, /a-Q8_0.gguf: .*'llama3'"):
        find("me/Llama-GGUF")
    assert not hub.gets


def test_a_head_in_a_file_of_its_own(machine: Machine, hub: Hub) -> None:
    """It is fetched when it is asked for."""
    folder, config = machine.home / "published", config_of("dense", mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    folder.mkdir()
    write_gguf(folder / "m-Q8_0.gguf", config, tensors, head=False)
    write_gguf(folder / "whole.gguf", config, tensors)
    (folder / "whole.gguf").rename(folder / "mtp-m-Q8_0.gguf")
    hub.publish(NAME, folder)
    path = find(NAME)
    assert hub.gets == ["m-Q8_0.gguf"]
    complete_head(path)
    complete_head(path)
    assert hub.gets == ["m-Q8_0.gguf", "mtp-m-Q8_0.gguf"]
    load_mtp(path, mlx_qwen35.load_model(path).config)


def test_beside_safetensors(machine: Machine, hub: Hub, published: Path) -> None:
    """Where a repository has both, the name alone means safetensors."""
    folder = checkpoint(machine.home / "both")
    (folder / "m-Q8_0.gguf").write_bytes((published / "Qwen3.5-tiny-Q8_0.gguf").read_bytes())
    hub.publish("me/both", folder)
    whole = find("me/both")
    assert (whole / "model.safetensors").exists() and not list(whole.glob("*.gguf"))
    assert find("me/both:Q8_0") == whole / "m-Q8_0.gguf"
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find("me/both:Q8_0") == whole / "m-Q8_0.gguf" and find("me/both") == whole


def test_a_key_of_lm_studio_with_both_forms(machine: Machine) -> None:
    """Its GGUF and its MLX form are variants of one key."""
    models = lmstudio.models_folder()
    path = written(models / "lmstudio-community/Qwen3.5-2B-GGUF/Qwen3.5-2B-Q8_0.gguf")
    tower(path.with_name("mmproj-Qwen3.5-2B-BF16.gguf"))
    mlx = machine.lmstudio("lmstudio-community/Qwen3.5-2B-MLX-4bit", bits=4)
    sources = [f"{{type: huggingface, user: lmstudio-community, repo: {p.name}}}" for p in (path.parent, mlx)]
    machine.catalogue("qwen/qwen3.5-2b", "base:\n" + "".join(f"  - sources: [{s}]\n" for s in sources))
    for ref in ("qwen/qwen3.5-2b@q8_0", "qwen/qwen3.5-2b:Q8_0", "qwen3.5-2b@q8_0", path.parent.name.lower()):
        assert find(ref) == path, ref
    assert find("qwen/qwen3.5-2b@4bit") == mlx
    assert find("lmstudio-community/Qwen3.5-2B-GGUF/Qwen3.5-2B-Q8_0.gguf") == path
    with pytest.raises(CheckpointError, match="matches 2 models"):
        find("qwen/qwen3.5-2b")


def test_listed_by_names_that_load(machine: Machine, hub: Hub, published: Path) -> None:
    for ref in (f"{NAME}:Q8_0", f"{NAME}:UD-Q5_K_XL"):
        find(ref)
    hub.gets.clear()
    listed: Iterator = (model for model in list_models() if model.place == hub_cache.PLACE)
    found = {model.name: model for model in listed}
    assert set(found) == {f"{NAME}@q8_0", f"{NAME}@ud-q5_k_xl"}
    for name, model in found.items():
        assert model.complete and model.vision and find(name) == model.folder
    assert not hub.gets
