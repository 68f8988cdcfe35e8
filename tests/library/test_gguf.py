"""GGUFs by the names that people give them: files, folders, split ones, LM Studio's and the Hub's cache's."""

import warnings
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import mlx_qwen35
from mlx_qwen35.cli.main import main
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import lmstudio
from mlx_qwen35.library.estimating import estimate
from mlx_qwen35.library.finding import find
from mlx_qwen35.library.listing import list_models
from tests.checkpoint.gguf.building import config_of, matrices, tiny_tokenizer, write_gguf, write_projector
from tests.checkpoints import random_tensors, tiny_config
from tests.machine import Machine


def written(path: Path, kind: str = "dense", blocks: str = "Q8_0", **kwargs) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    config = config_of(kind, mtp_num_hidden_layers=1)
    write_gguf(path, config, random_tensors(config), matrices(blocks), tokenizer=tiny_tokenizer(), **kwargs)
    return path


def tower(path: Path, width: int = 256) -> Path:
    config = tiny_config("dense", vision=True, hidden_size=width)
    write_projector(path, config, random_tensors(config))
    return path


def test_load_and_answer(machine: Machine) -> None:
    path = written(machine.home / "model-Q8_0.gguf")
    model, processor = mlx_qwen35.load(path, mtp=True)
    assert processor.encode("hello<|im_end|>")[-1] == processor.tokenizer.token_id("<|im_end|>")
    assert processor.eos_token_ids == {processor.tokenizer.token_id(t) for t in ("<|im_end|>", "<|endoftext|>")}
    text = mlx_qwen35.generate(model, processor, "hello", max_tokens=6)
    assert text == mlx_qwen35.generate(*mlx_qwen35.load(str(path)), "hello", max_tokens=6)
    assert processor.media_limits is None


def test_a_model_that_sees(machine: Machine) -> None:
    path = written(machine.home / "models" / "m-Q8_0.gguf")
    tower(path.with_name("mmproj-F16.gguf"))
    model, processor = mlx_qwen35.load(path.parent)
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    from PIL import Image

    prompt = processor.prompt("What is this?", images=[Image.fromarray(pixels)], max_pixels=4096)
    assert prompt.media and mx.all(mx.isfinite(model(mx.array([prompt.tokens]), media=[list(prompt.media)]))).item()


def test_names(machine: Machine) -> None:
    machine.monkeypatch.chdir(machine.home)
    models = lmstudio.models_folder()
    only = written(models / "me" / "Qwen3.5-2B-GGUF" / "Qwen3.5-2B-Q8_0.gguf")
    tower(only.with_name("mmproj-Qwen3.5-2B-BF16.gguf"))
    several = models / "unsloth" / "Qwen3.5-4B-GGUF"
    for name in ("Qwen3.5-4B-Q4_K_M.gguf", "Qwen3.5-4B-UD-IQ2_XXS.gguf"):
        written(several / name)
    assert find("me/Qwen3.5-2B-GGUF") == find("qwen3.5-2b") == find("qwen3.5-2b@q8_0") == only
    assert find(only) == find(only.parent) / only.name == only
    four = several / "Qwen3.5-4B-Q4_K_M.gguf"
    assert find("qwen3.5-4b@q4_k_m") == find("unsloth/Qwen3.5-4B-GGUF@q4_k_m") == four
    with pytest.raises(CheckpointError, match="(?s)matches 2 models.*@q4_k_m.*@ud-iq2_xxs") as error:
        find("qwen3.5-4b")
    assert "unsloth/Qwen3.5-4B-GGUF@q4_k_m" in str(error.value)
    with pytest.raises(CheckpointError, match="holds 2 models: give one of these files"):
        mlx_qwen35.load_model(several)
    machine.catalogue(
        "qwen/qwen3.5-2b",
        "base:\n  - key: me/qwen3.5-2b-gguf\n    sources: [{type: huggingface, user: me, repo: Qwen3.5-2B-GGUF}]\n",
    )
    assert find("qwen/qwen3.5-2b") == only


def test_a_split_model_by_any_of_its_files(machine: Machine) -> None:
    folder = machine.home / "split"
    written(folder / "m.gguf", "moe", split=10)
    files = sorted(folder.glob("*.gguf"))
    assert len(files) > 3
    assert find(files[2]) == files[0] and find(folder) == folder
    wanted = mlx_qwen35.load_model(files[0])(mx.array([[1, 2, 3]]))
    assert mx.array_equal(mlx_qwen35.load_model(folder)(mx.array([[1, 2, 3]])), wanted).item()
    files[1].unlink()
    with pytest.raises(CheckpointError, match="lacks 1 of .* files .*finish the download"):
        mlx_qwen35.load_model(folder)
    (listed,) = [model for model in list_models(folder) if model.place == "folder"]
    assert "finish the download" in listed.problem


def test_the_hubs_cache(machine: Machine) -> None:
    snapshot = machine.cached("unsloth/Qwen3.5-4B-GGUF")
    for path in snapshot.iterdir():
        path.unlink()
    four, eight = (written(snapshot / f"Qwen3.5-4B-{kind}.gguf") for kind in ("Q4_K_M", "Q8_0"))
    assert find("unsloth/Qwen3.5-4B-GGUF@q4_k_m") == four and find("unsloth/qwen3.5-4b-gguf@Q8_0") == eight
    with pytest.raises(CheckpointError, match="matches 2 models"):
        find("unsloth/Qwen3.5-4B-GGUF")
    eight.unlink()
    assert find("unsloth/Qwen3.5-4B-GGUF") == four


def test_listed_with_their_true_bits(machine: Machine, capsys: pytest.CaptureFixture[str]) -> None:
    models = lmstudio.models_folder()
    path = written(models / "me" / "Qwen3.5-2B-GGUF" / "Qwen3.5-2B-Q8_0.gguf")
    tower(path.with_name("mmproj-F16.gguf"))
    written(models / "me" / "Qwen3.5-4B-GGUF" / "Qwen3.5-4B-IQ2_XXS.gguf", "moe", "IQ2_XXS")
    other = models / "me" / "Llama-3-GGUF" / "llama.gguf"
    other.parent.mkdir(parents=True)
    other.write_bytes(path.read_bytes().replace(b"qwen35", b"llama3", 1))
    found = {model.name: model for model in list_models()}
    assert "me/Llama-3-GGUF" not in found
    eight, two = found["me/Qwen3.5-2B-GGUF"], found["me/Qwen3.5-4B-GGUF"]
    assert eight.complete and eight.vision and eight.mtp and eight.architecture == "dense"
    assert 8.5 < eight.bits_per_weight < 9.5 and eight.quantization == "gguf Q8_0"
    assert eight.nbytes == sum(file.stat().st_size for file in path.parent.iterdir())
    assert two.complete and not two.vision and two.architecture == "moe" and 2 < two.bits_per_weight < 2.6
    assert main(["ls"]) == 0
    shown = capsys.readouterr().out
    assert "gguf Q8_0" in shown and "gguf IQ2_XXS" in shown


def test_estimates_say_what_decoded_weights_take(machine: Machine) -> None:
    packed = written(machine.home / "a-Q8_0.gguf")
    decoded = written(machine.home / "b-Q6_K.gguf", blocks="Q6_K")
    eight, six = (estimate(path, memory="2GB", dtype="float16") for path in (packed, decoded))
    config = config_of("dense")
    model = mlx_qwen35.load_model(packed, dtype="float16")
    assert model.config.text.vocab_size == config["text_config"]["vocab_size"]
    for plan, path in ((eight, packed), (six, decoded)):
        loaded = mlx_qwen35.load_model(path, dtype="float16")
        from mlx.utils import tree_flatten

        nbytes = sum(array.nbytes for _, array in tree_flatten(loaded.parameters()))
        assert plan.weights.total == pytest.approx(nbytes, rel=0.02)
    assert six.weights.total > 1.6 * eight.weights.total


def test_several_towers_are_told(machine: Machine) -> None:
    path = written(machine.home / "m" / "a-Q8_0.gguf")
    for name in ("mmproj-F16.gguf", "mmproj-BF16.gguf"):
        tower(path.with_name(name))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model = mlx_qwen35.load_model(path)
    assert model.config.vision is not None
    assert any("mmproj-BF16.gguf is taken" in str(one.message) for one in said)


def test_as_the_servers_clients_see_it(machine: Machine) -> None:
    pytest.importorskip("starlette")
    from mlx_qwen35.serving.catalogue import Listed
    from mlx_qwen35.serving.lmstudio_lists import _model, _older
    from mlx_qwen35.serving.ollama_lists import _details
    from mlx_qwen35.serving.places import named

    (place,) = named([written(machine.home / "models" / "Qwen3.5-2B-Q8_0.gguf")])
    assert place.name == "Qwen3.5-2B-Q8_0" and place.folder.suffix == ".gguf"
    listed = Listed(place.name, place.stored)
    newer, older, ollama = _model(listed), _older(listed), _details(listed)
    assert (newer["format"], newer["quantization"]["name"]) == ("gguf", "Q8_0")
    assert (older["compatibility_type"], older["quantization"]) == ("gguf", "Q8_0")
    assert (ollama["format"], ollama["quantization_level"]) == ("gguf", "Q8_0")
