"""What can be refused costs no download: neither weights nor a tokenizer are fetched before all else was checked."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from PIL import Image

import mlx_qwen35
from mlx_qwen35.cli.main import main
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError, Qwen35Error
from mlx_qwen35.library import find, hold, load_model, loading
from mlx_qwen35.library.beforehand import check_offer
from mlx_qwen35.library.hub import Offer
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.fake_hub import Hub
from tests.machine import Machine, checkpoint
from tests.text.folders import write_text_files

NAME = "Qwen/Qwen3.5-tiny"
EXPERTS = "Qwen/Qwen3.5-tiny-A1B"
OTHER = "Qwen/Qwen3.5-other"


@pytest.fixture
def published(machine: Machine, hub: Hub) -> Path:
    """A folder with what flags name; on the Hub are a dense model that cannot see, one with experts, one of another
    vocabulary."""
    for name, kind, words in ((NAME, "dense", 320), (EXPERTS, "moe", 320), (OTHER, "dense", 300)):
        folder = checkpoint(machine.home / "published" / name, kind=kind, text={"vocab_size": words})
        hub.publish(name, write_text_files(folder))
    folder = machine.home / "here"
    folder.mkdir()
    machine.monkeypatch.chdir(folder)
    (folder / "words.txt").write_text("no session, no picture, no tools")
    (folder / "taken").mkdir()
    (folder / "taken" / "config.json").write_text("{}")
    Image.new("RGB", (64, 64)).save(folder / "photo.png")
    (folder / "adapter").mkdir()
    return folder


def fetched(hub: Hub) -> set[str]:
    """What was fetched but for config.json, of which what is said follows."""
    return set(hub.gets) - {"config.json"}


ASKING = [
    "--tools missing.json",
    "--tools words.txt",
    "--session words.txt",
    "--session no/such/folder/x",
    "--image missing.png",
    "--image words.txt",
    "--video missing.mp4",
    "--image photo.png",  # which this model cannot see
    "--image https://example.com/photo.png",
    "--adapter-path adapter",
    "--adapter-path missing",
    "--memory 24",
    "--memory much",
    "--memory 1MB",
    "--context-length 10000000",
    "--context-length 1",
    "--kv-bits 3",
    "--kv-bits 8 --kv-group-size 7",
    f"--draft-model {OTHER}",
    "--draft-model no-such-model",
    "--mtp --draft-model demo",
    "--top-p 7",
    "--reasoning-effort somewhat",
    "--chat-template-config {",
]
SMALL = {"config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


@pytest.mark.parametrize("command", ["generate -p hi", "chat"])
@pytest.mark.parametrize("flags", ASKING)
def test_asking(
    published: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: Any, command: str, flags: str
) -> None:
    monkeypatch.setattr("sys.stdin", open(published / "words.txt"))
    assert main([*command.split(), "--model", NAME, *flags.split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and fetched(hub) == set(), (error, hub.gets)


def test_what_the_template_refuses(published: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Costs the small files, and no weights."""
    refusing = "{%- if tools %}{{ raise_exception('No tools here.') }}{% endif %}{{ messages[0].content }}"
    hub.repositories[NAME]["chat_template.jinja"] = refusing.encode()
    (published / "tools.json").write_text('[{"type": "function", "function": {"name": "f"}}]')
    for command in ("generate -p hi", "chat"):
        assert main([*command.split(), "--model", NAME, "--tools", "tools.json"]) == 2
        assert "No tools here." in capsys.readouterr().err and set(hub.gets) == SMALL
    assert main(["generate", "-p", "hi " * 300, "--model", NAME, "--context-length", "200"]) == 2
    assert "200" in capsys.readouterr().err and set(hub.gets) == SMALL


def test_memory_is_refused_only_where_the_files_would_be(tmp_path: Path) -> None:
    """And it is refused, by what is nearly as much as they say."""
    write_fp8(tmp_path / "fp8", "moe")
    write_gptq(tmp_path / "gptq", "dense")
    made = {
        "dense": checkpoint(tmp_path / "dense", kind="dense"),
        "moe": checkpoint(tmp_path / "moe", kind="moe"),
        "fp8": tmp_path / "fp8",
        "gptq": tmp_path / "gptq",
        "4bit": mlx_qwen35.convert("demo", tmp_path / "4bit"),
        "demo": find("demo"),
    }
    refused = {name: 0 for name in made}
    for name, folder in made.items():
        files = {path.name: path.stat().st_size for path in folder.iterdir()}
        offer = Offer(name, "0" * 40, ModelConfig.from_folder(folder), files)
        for memory in range(100_000_000, 500_000_000, 17_000_000):
            try:
                check_offer(offer, memory)
            except CheckpointError as error:
                assert "does not fit into" in str(error)
                refused[name] += 1
                with pytest.raises(CheckpointError, match="does not fit into"):
                    hold(folder, memory)
    assert all(refused.values())


CONVERTING = [
    "taken",
    "x --q-bits 7",
    "x --q-bits 4 --q-group-size 48",
    "x --q-mode mxfp4 --quant-predicate mixed_3_6",
    "x --quant-predicate nonsense",
    "x --target-size 5GB --q-mode mxfp4",
    "x --adapter-path adapter",
    "words.txt",
    "words.txt/x",
    "x --target-size much",
]


@pytest.mark.parametrize("words", CONVERTING)
def test_converting(published: Path, hub: Hub, capsys: pytest.CaptureFixture[str], words: str) -> None:
    before = sorted(published.rglob("*"))
    assert main(["convert", NAME, *words.split()]) == 2
    assert "error: " in capsys.readouterr().err and fetched(hub) == set()
    assert sorted(published.rglob("*")) == before


REFUSED: list[Callable[[], object]] = [
    lambda: mlx_qwen35.load(NAME, memory="much"),
    lambda: mlx_qwen35.load(NAME, memory=24),
    lambda: mlx_qwen35.load(NAME, memory="1MB"),
    lambda: mlx_qwen35.load(EXPERTS, memory="1MB"),
    lambda: mlx_qwen35.load(NAME, dtype="float8"),
    lambda: mlx_qwen35.load(NAME, kv_bits=5),
    lambda: mlx_qwen35.load(NAME, context_length=10**7),
    lambda: mlx_qwen35.load(NAME, yarn=True),
    lambda: mlx_qwen35.load(NAME, adapter_path="missing"),
    lambda: mlx_qwen35.convert(NAME, "taken"),
    lambda: mlx_qwen35.convert(NAME, "x", bits=7),
    lambda: mlx_qwen35.convert(NAME, "x", bits=None, recipe="uniform"),
    lambda: mlx_qwen35.convert(NAME, "x", dtype="float8"),
    lambda: mlx_qwen35.convert(NAME, "x", bit=4),
    lambda: mlx_qwen35.convert(NAME, "x", bits="4"),
    lambda: mlx_qwen35.convert(NAME, "x", overwrite="no"),
    lambda: mlx_qwen35.convert(NAME, "x", target_size="much"),
    lambda: mlx_qwen35.convert(NAME, "x", target_size=0.5),
    lambda: mlx_qwen35.convert(NAME, "x", on_download=5),
    lambda: mlx_qwen35.convert(NAME, 5),
    lambda: mlx_qwen35.convert(NAME, " "),
    lambda: mlx_qwen35.load_draft_model(OTHER, load_model(find("demo"))),
]


@pytest.mark.parametrize("number", range(len(REFUSED)))
def test_in_python(published: Path, hub: Hub, number: int) -> None:
    with pytest.raises(Qwen35Error):
        REFUSED[number]()
    assert fetched(hub) == set()


def test_what_is_right_is_downloaded(published: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    """Once, with one bar of its own; then `convert` works by name in Python as it does on the command line."""
    seen: list[tuple[int, int]] = []
    assert mlx_qwen35.convert(NAME, "a", bits=None, dtype="float16", on_progress=lambda *at: seen.append(at))
    assert capsys.readouterr() == ("", "")
    downloads, conversion = [at for at in seen if at[0] == 0]
    assert downloads[1] > conversion[1] and seen[-1] == (conversion[1], conversion[1])
    assert main(["convert", OTHER, "b", "-q"]) == 0
    err = capsys.readouterr().err
    assert err.count("Downloading: ") == 1 and "Converting: " in err and "config.json" not in err
    assert mlx_qwen35.convert("demo", "c") == Path("c") and json.loads(Path("c/config.json").read_text())
    assert mlx_qwen35.load(Path("c"))


def test_a_size_in_words(tmp_path: Path) -> None:
    folder = mlx_qwen35.convert("demo", tmp_path / "small", target_size="8MB")
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8e6
    with pytest.raises(Qwen35Error, match="did you mean bits"):
        mlx_qwen35.convert("demo", tmp_path / "x", bit=4)


def test_a_picture_that_is_not_there_costs_no_look_at_the_hub(
    published: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in (["generate", "-p", "hi"], ["chat"]):
        assert main([*command, "--model", NAME, "--image", "missing.png"]) == 2
        assert "no picture at missing.png" in capsys.readouterr().err and hub.gets == []


def test_one_bar_where_none_is_given(published: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    mlx_qwen35.load(NAME)
    err = capsys.readouterr().err
    bars = {line.partition(":")[0] for line in err.replace("\n", "\r").split("\r") if line.strip()}
    assert bars == {NAME} and "100%" in err
    mlx_qwen35.load(OTHER, on_progress=mlx_qwen35.ProgressBar("Loading"))
    err = capsys.readouterr().err
    assert {line[:7] for line in err.replace("\n", "\r").split("\r")} == {"", "Loading"}
    bars = [bar.rpartition("\r")[2] for bar in err.split("\n") if bar.strip()]  # as each was left
    assert len(bars) == 2 and all("100%" in bar for bar in bars)


def test_an_adapter_of_another_model_costs_no_weights(
    published: Path, hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a download nor, of what is here, the reading."""
    name = "language_model.model.layers.0.mlp.gate_proj"
    leaves = {f"{name}.lora_a": mx.zeros((7, 2)), f"{name}.lora_b": mx.zeros((2, 7))}
    mx.save_safetensors("adapter/adapters.safetensors", leaves)
    parameters = {"rank": 2, "scale": 1.0, "dropout": 0.0}
    Path("adapter/adapter_config.json").write_text(json.dumps({"lora_parameters": parameters, "num_layers": 1}))
    monkeypatch.setattr(loading, "read_model", None)
    for model in (NAME, "demo"):
        with pytest.raises(CheckpointError, match="was trained on another model"):
            mlx_qwen35.load(model, adapter_path="adapter")
        assert main(["generate", "-p", "hi", "--model", model, "--adapter-path", "adapter"]) == 2
        assert "was trained on another model" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="was trained on another model"):
        mlx_qwen35.convert(NAME, "x", adapter_path="adapter")
    assert fetched(hub) == set()
