"""Which folder a name means, in LM Studio's layouts and the Hugging Face cache, and what is said of one without."""

import json
import re
from pathlib import Path

import pytest

from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import demo_folder, find, lmstudio
from mlx_qwen35.library.finding import HubName, look_up
from mlx_qwen35.library.listing import list_models
from mlx_qwen35.library.suggesting import PUBLISHED, alike
from tests.machine import COMMIT, OTHER_COMMIT, Machine, checkpoint, foreign, gguf

CATALOGUE = """
model: qwen/qwen3.5-4b
base:
  - key: lmstudio-community/qwen3.5-4b-gguf
    sources: [{type: huggingface, user: lmstudio-community, repo: Qwen3.5-4B-GGUF}]
  - key: lmstudio-community/qwen3.5-4b-mlx-4bit
    sources: [{type: huggingface, user: lmstudio-community, repo: Qwen3.5-4B-MLX-4bit}]
  - key: lmstudio-community/qwen3.5-4b-mlx-8bit
"""


def refusal(ref: str | Path) -> str:
    with pytest.raises(CheckpointError) as error:
        look_up(ref)
    return str(error.value)


def test_folders(machine: Machine) -> None:
    folder = checkpoint(machine.home / "model")
    assert find(folder) == find(str(folder)) == folder
    assert find("~/model") == folder
    machine.monkeypatch.chdir(machine.home)
    assert find("model") == Path("model")
    assert find(f"{folder}/") == find(folder / "config.json") == folder
    assert find("model/model.safetensors") == Path("model")
    (folder / "notes.txt").touch()
    assert "is a file: give the folder" in refusal(folder / "notes.txt")
    assert "is no folder" in refusal(folder / "no")  # a Path is never looked up as a name
    assert "is no folder" in refusal("./no/such/one")
    assert f"Did you mean {folder}?" in refusal("~/modle") and "Did you mean" not in refusal("~/other")
    (machine.home / "x.gguf").touch()
    (folder.parent / "x.safetensors").touch()
    assert find("x.gguf") == Path("x.gguf") and "is a file: give the folder" in refusal("x.safetensors")


def test_the_demo(machine: Machine) -> None:
    assert find(None) == find("demo") == demo_folder()
    machine.monkeypatch.chdir(machine.home)
    folder = checkpoint(machine.home / "demo")
    assert find("demo") == find(" demo ") == demo_folder()
    assert find(next(model.name for model in list_models(".") if model.folder == Path("demo"))) == Path("demo")
    assert find("./demo") == find(Path("demo")) == find("demo/") == Path("demo") and find(folder) == folder


@pytest.mark.parametrize("layout", ["today", "old", "pointer", "moved", "pointer and moved"])
def test_where_lm_studio_keeps_its_models(machine: Machine, layout: str) -> None:
    home = machine.home / ".lmstudio"
    if layout == "old":
        home = machine.home / ".cache" / "lm-studio"
    elif layout.startswith("pointer"):
        (machine.home / ".cache" / "lm-studio").mkdir(parents=True)
        home = machine.home / "elsewhere"
        (machine.home / ".lmstudio-home-pointer").write_text(f"{home}\n")
    models = home / "models"
    assert lmstudio.models_folder() == (models if layout != "old" else machine.home / ".lmstudio" / "models")
    home.mkdir(parents=True)
    if layout.endswith("moved"):
        models = machine.home / "disk" / "models"
        (home / "settings.json").write_text(json.dumps({"downloadsFolder": str(models)}))
    assert lmstudio.models_folder() == models
    folder = machine.lmstudio("mlx-community/Qwen3.5-4B-4bit", root=models)
    assert find("mlx-community/Qwen3.5-4B-4bit") == folder


@pytest.mark.parametrize("settings", [b"", b"[]", b'{"downloadsFolder": 7}', b'{"downloadsFolder": " "}', b"\xff"])
def test_damaged_settings_of_lm_studio_change_nothing(machine: Machine, settings: bytes) -> None:
    (machine.home / ".lmstudio").mkdir()
    (machine.home / ".lmstudio" / "settings.json").write_bytes(settings)
    (machine.home / ".lmstudio-home-pointer").write_text("\n")
    assert lmstudio.models_folder() == machine.home / ".lmstudio" / "models"


def test_names_in_lm_studio(machine: Machine) -> None:
    four = machine.lmstudio("lmstudio-community/Qwen3.5-4B-MLX-4bit", bits=4)
    eight = machine.lmstudio("mlx-community/Qwen3.5-4B-8bit", bits=8)
    for name in (
        "lmstudio-community/Qwen3.5-4B-MLX-4bit",
        "lmstudio-community/qwen3.5-4b-mlx-4bit",
        "qwen3.5-4b-mlx-4bit",
        "qwen3.5-4b-mlx",
        "qwen3.5-4b@4bit",
        "lmstudio-community/qwen3.5-4b@4bit",
    ):
        assert find(name) == four, name
    assert find("Qwen3.5-4B@8bit") == eight
    said = refusal("qwen3.5-4b")
    assert "matches 2 models" in said
    assert re.search(r"lmstudio-community/Qwen3.5-4B-MLX-4bit +4bit, LM Studio", said)
    assert re.search(r"mlx-community/Qwen3.5-4B-8bit +8bit, LM Studio", said)
    assert "not here as @6bit" in refusal("qwen3.5-4b@6bit")


def test_two_publishers_of_one_model(machine: Machine) -> None:
    machine.lmstudio("a/Qwen3.5-4B-4bit", bits=4)
    machine.lmstudio("b/Qwen3.5-4B-4bit", bits=4)
    for name in ("Qwen3.5-4B-4bit", "qwen3.5-4b", "qwen3.5-4b@4bit"):
        said = refusal(name)
        assert "a/Qwen3.5-4B-4bit" in said and "b/Qwen3.5-4B-4bit" in said
    assert find("b/qwen3.5-4b@4bit").parent.name == "b"


def test_keys_of_the_catalogue(machine: Machine) -> None:
    machine.catalogue("qwen/qwen3.5-4b", CATALOGUE)
    machine.catalogue("me/again", "base: qwen/qwen3.5-4b\n")
    assert "none of its downloads is in" in refusal("qwen/qwen3.5-4b")
    gguf(lmstudio.models_folder() / "lmstudio-community" / "Qwen3.5-4B-GGUF")
    assert "model-Q4_K_M.gguf ends early" in refusal("qwen/qwen3.5-4b")
    four = machine.lmstudio("lmstudio-community/Qwen3.5-4B-MLX-4bit", bits=4)
    assert find("qwen/qwen3.5-4b") == find("me/again") == find("qwen3.5-4b") == four
    eight = machine.lmstudio("lmstudio-community/Qwen3.5-4B-MLX-8bit", bits=8)
    assert "matches 2 models" in refusal("qwen/qwen3.5-4b")
    assert find("qwen/qwen3.5-4b@4bit") == find("qwen3.5-4b@4bit") == four
    assert find("qwen/qwen3.5-4b@8bit") == eight
    # the Hub's own name of the unquantized model is not LM Studio's key
    assert look_up("Qwen/Qwen3.5-4B") == HubName("Qwen/Qwen3.5-4B", None)


@pytest.mark.parametrize("text", ["", "[1, 2]", "base: 7", "base: [7, {sources: 3}]", "base: me/odd", ": : :", "\0"])
def test_damaged_entries_of_the_catalogue(machine: Machine, text: str) -> None:
    machine.catalogue("me/odd", text)
    machine.lmstudio("me/Qwen3.5-2B")
    assert find("qwen3.5-2b").name == "Qwen3.5-2B"
    assert "none of its downloads" in refusal("me/odd")


@pytest.mark.parametrize(
    "name, stem, variant",
    [
        ("Qwen3.5-35B-A3B-4bit", "qwen3.5-35b-a3b", "4bit"),
        ("Qwen3.5-35B-A3B-MLX-8bit", "qwen3.5-35b-a3b", "8bit"),
        ("Qwen3.5-27B-4bit-DWQ", "qwen3.5-27b", "4bit-dwq"),
        ("Qwen3.5-27B-4bit-DWQ", "qwen3.5-27b", "4bit"),
        ("Qwen3.5-397B-A17B-FP8", "qwen3.5-397b-a17b", "fp8"),
        ("Qwen3.5-9B-GPTQ-Int4", "qwen3.5-9b", "gptq-int4"),
        ("Qwen3.5-2B-mxfp4", "qwen3.5-2b", "mxfp4"),
        ("Qwen3.5-2B-bf16", "qwen3.5-2b", "bf16"),
        ("Qwen3.5-2B-mlx", "qwen3.5-2b", None),
        ("Qwen3.5-2B-4.5bit", "qwen3.5-2b", "4.5bit"),
        ("Qwen3.5-2B", "qwen3.5-2b", "fp32"),  # from config.json
    ],
)
def test_how_publishers_name_quantizations(machine: Machine, name: str, stem: str, variant: str | None) -> None:
    folder = machine.lmstudio(f"someone/{name}")
    assert find(stem) == folder
    if variant:
        assert find(f"{stem}@{variant}") == folder


def test_the_hugging_face_cache(machine: Machine) -> None:
    snapshot = machine.cached("Qwen/Qwen3.5-4B", shards=2)
    assert find("Qwen/Qwen3.5-4B") == find("qwen/qwen3.5-4b") == find("qwen3.5-4b") == snapshot
    assert (
        find("Qwen/Qwen3.5-4B@main") == find(f"Qwen/Qwen3.5-4B@{COMMIT}") == find("Qwen/Qwen3.5-4B@0123456") == snapshot
    )
    assert look_up("Qwen/Qwen3.5-4B@v2") == HubName("Qwen/Qwen3.5-4B", "v2")
    older = machine.cached("Qwen/Qwen3.5-4B", commit=OTHER_COMMIT, revision="refs/pr/1", kind="moe")
    assert find("Qwen/Qwen3.5-4B@refs/pr/1") == find(f"Qwen/Qwen3.5-4B@{OTHER_COMMIT}") == older
    assert find("Qwen/Qwen3.5-4B") == snapshot


@pytest.mark.parametrize(
    "variable, inside", [("HF_HUB_CACHE", ""), ("HF_HOME", "hub"), ("XDG_CACHE_HOME", "huggingface/hub")]
)
def test_a_cache_elsewhere(machine: Machine, variable: str, inside: str) -> None:
    snapshot = machine.cached("Qwen/Qwen3.5-4B", root=machine.home / "disk" / inside)
    assert isinstance(look_up("Qwen/Qwen3.5-4B"), HubName)
    machine.monkeypatch.setenv(variable, "~/disk")
    assert find("Qwen/Qwen3.5-4B") == snapshot


def test_snapshots_that_main_does_not_mean(machine: Machine) -> None:
    one = machine.cached("Qwen/Qwen3.5-4B", revision=None)
    assert find("Qwen/Qwen3.5-4B") == one  # the only one there is
    other = machine.cached("Qwen/Qwen3.5-4B", commit=OTHER_COMMIT, revision=None)
    assert look_up("Qwen/Qwen3.5-4B") == HubName("Qwen/Qwen3.5-4B", None)
    assert find(f"Qwen/Qwen3.5-4B@{COMMIT[:8]}") == one
    assert find(f"Qwen/Qwen3.5-4B@{OTHER_COMMIT[:8]}") == other
    assert f"Qwen/Qwen3.5-4B@{OTHER_COMMIT[:8]}" in refusal("qwen3.5-4b")  # which names both


def test_an_incomplete_snapshot(machine: Machine) -> None:
    snapshot = machine.cached("Qwen/Qwen3.5-4B", shards=3)
    (snapshot / "model-00002-of-00003.safetensors").unlink()
    assert look_up("Qwen/Qwen3.5-4B") == HubName("Qwen/Qwen3.5-4B", None)  # the rest is to be downloaded
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search("model-00002-of-00003.safetensors is missing.*HF_HUB_OFFLINE", refusal("Qwen/Qwen3.5-4B"))
    # a link whose blob is gone counts as missing
    other = machine.cached("Qwen/Qwen3.5-2B", commit=OTHER_COMMIT)
    (other / "model.safetensors").resolve().unlink()
    assert "model.safetensors is missing" in refusal("Qwen/Qwen3.5-2B")


@pytest.mark.parametrize(
    "page",
    ["https://huggingface.co/Qwen/Qwen3.5-4B", "hf.co/Qwen/Qwen3.5-4B/tree/main", "Qwen/Qwen3.5-4B/",
     "https://huggingface.co/Qwen/Qwen3.5-4B?library=mlx", " Qwen/Qwen3.5-4B\n", "hf://Qwen/Qwen3.5-4B",
     "https://huggingface.co/Qwen/Qwen3.5-4B/blob/main/config.json"],
)  # fmt: skip
def test_names_as_they_are_copied(machine: Machine, page: str) -> None:
    assert look_up(page) == HubName("Qwen/Qwen3.5-4B", None)
    assert look_up("https://hf.co/Qwen/Qwen3.5-4B/tree/v1.0") == HubName("Qwen/Qwen3.5-4B", "v1.0")


def test_a_repository_of_the_cache(machine: Machine) -> None:
    snapshot = machine.cached("Qwen/Qwen3.5-4B")
    assert find(snapshot.parents[1]) == find(str(snapshot.parents[1])) == snapshot


def test_order(machine: Machine) -> None:
    """A folder, then LM Studio, then the cache, then the Hub."""
    name = "Qwen/Qwen3.5-4B"
    assert look_up(name) == HubName(name, None)
    cached = machine.cached(name)
    assert find(name) == cached
    downloaded = machine.lmstudio(name)
    assert find(name) == downloaded
    machine.monkeypatch.chdir(machine.home)
    checkpoint(machine.home / name)
    assert find(name) == Path(name)


def test_what_cannot_be_loaded_is_named_with_its_reason(machine: Machine) -> None:
    models = lmstudio.models_folder()
    foreign(models / "meta" / "Llama-3")
    gguf(models / "unsloth" / "Qwen3.5-9B-GGUF")
    (models / "me" / "Qwen3.5-empty").mkdir(parents=True)
    cut = machine.lmstudio("me/Qwen3.5-cut", shards=4)
    for number in (2, 3, 4):
        (cut / f"model-0000{number}-of-00004.safetensors").unlink()
    damaged = machine.lmstudio("me/Qwen3.5-damaged")
    (damaged / "config.json").write_text("{")
    index = machine.lmstudio("me/Qwen3.5-index", shards=2)
    (index / "model.safetensors.index.json").write_text("{}")
    assert "model_type is 'llama'" in refusal("meta/Llama-3")
    assert re.search("Qwen3.5-9B-GGUF.*model-Q4_K_M.gguf ends early", refusal("qwen3.5-9b"))
    assert re.search("me/Qwen3.5-empty.*config.json does not exist", refusal("me/Qwen3.5-empty"))
    assert re.search("me/Qwen3.5-cut.*model-00002-of-00004.*model-00004.* are missing", refusal("Qwen3.5-cut"))
    assert re.search("me/Qwen3.5-damaged.*is not valid JSON", refusal("me/qwen3.5-damaged"))
    assert re.search("me/Qwen3.5-index.*has no weight_map", refusal("me/Qwen3.5-index"))
    # beside one that can, they do not count
    good = machine.lmstudio("me/Qwen3.5-9B-8bit", bits=8)
    assert find("qwen3.5-9b") == good
    machine.cached("meta/Llama-4", commit=OTHER_COMMIT)
    (machine.home / ".cache/huggingface/hub/models--meta--Llama-4/snapshots" / OTHER_COMMIT / "config.json").unlink()
    assert isinstance(look_up("meta/Llama-4"), HubName)


def test_near_misses(machine: Machine) -> None:
    machine.lmstudio("mlx-community/Qwen3.5-35B-A3B-4bit")
    machine.cached("Qwen/Qwen3.5-0.8B")
    assert "Did you mean mlx-community/Qwen3.5-35B-A3B-4bit?" in refusal("qwen3.5-35b-a3b-4bits")
    assert "Did you mean Qwen/Qwen3.5-0.8B?" in refusal("qwen3.5-08b")
    assert "Did you mean mlx-community/Qwen3.5-35B-A3B-4bit?" in refusal("qwen3.5:35b")  # as Ollama spells it
    assert "Hugging Face Hub there is Qwen/Qwen3.5-9B: " in refusal("qwen3.5-9b")  # not the 0.8B that is here
    for other in ("gemma", "mlx-community/Llama-3.2-3B-4bit", "mlx-community/gpt-oss-20b", "gpt-35b"):
        assert alike(other, ["mlx-community/Qwen3.5-35B-A3B-4bit", "Qwen/Qwen3.5-0.8B", *PUBLISHED]) == []
    assert "Did you mean" not in refusal("gemma") and "there is" not in refusal("gemma")
    assert "Did you mean mlx-community/Qwen3.5-35B-A3B-4bit?" in refusal("qwen-35b")
    assert "On the Hugging Face Hub there is Qwen/Qwen3.5-27B and Qwen/Qwen3.6-27B and " in refusal("qwen-27b")
    assert "On the Hugging Face Hub there is Qwen/Qwen3.5-397B-A17B: " in refusal("qwen3.5-397b")
    machine.monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert re.search("HF_HUB_OFFLINE.*Did you mean Qwen/Qwen3.5-0.8B?", refusal("Qwen/Qwen3.5-0.9B"))
    assert "Hub there is" not in refusal("qwen3.5-9b")  # which cannot be had
    assert refusal("demmo").count("Did you mean demo?") == 1
    for odd in ("", " ", "a b", "@4bit", "a//b", "a/b/c", "-", "a/b@", "\0", 5, b"demo", ["demo"]):
        refusal(odd)
