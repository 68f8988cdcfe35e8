"""LoRA adapters between mlx-lm and us: either reads what the other's training wrote, with equal logits, fused too."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

import mlx_qwen35
from mlx_qwen35.checkpoint.adapters import fuse, load_adapter, read_adapter, save_adapter
from mlx_qwen35.conversion import task
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library import loading
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

peer = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
from mlx_lm.tuner.utils import linear_to_lora_layers  # noqa: E402
from mlx_lm.tuner.utils import load_adapters as their_load  # noqa: E402

TOLERANCE = 2e-3
SIZES = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
    "full_attention_interval": 2,
    "hidden_size": 64,
    "head_dim": 32,
    "rope_parameters": {"mrope_section": [3, 3, 2]},
    "linear_value_head_dim": 32,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 24,
}
FFN = {
    "dense": {"intermediate_size": 128},
    "moe": {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 128},
}
TOKENS = np.random.RandomState(5).randint(0, 80, (1, 33)).tolist()


@pytest.fixture(scope="module", params=["dense", "moe", "dense 4 bits", "moe 8 bits"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as mlx-lm writes it, quantized or not."""
    kind, _, bits = request.param.partition(" ")
    config = tiny_config(kind, **SIZES, **FFN[kind])
    source = write_checkpoint(tmp_path_factory.mktemp("base") / "hf", config, random_tensors(config, 3))
    if not bits:
        return source
    model, config = peer.load_model(source)
    model, config = peer.quantize_model(model, config, 32, int(bits[0]))
    peer.save_model(source.parent / "mlx", model)
    peer.save_config(config, source.parent / "mlx" / "config.json")
    return source.parent / "mlx"


def trained(
    model: Any, target: Path, *, kind: str = "lora", layers: int = 2, keys: list[str] | None = None, save: bool = True
) -> Path:
    """As if mlx-lm had trained `model`: its layers around those of the model, with values, and its files."""
    model.freeze()
    parameters = {"rank": 3, "scale": 4.0, "dropout": 0.1} | ({"keys": keys} if keys else {})
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    rng = np.random.RandomState(7)
    values = [
        (name, value * mx.array(rng.uniform(0.5, 1.5, value.shape).astype(np.float32)))
        if name.endswith(".m")
        else (name, mx.array(rng.standard_normal(value.shape).astype(np.float32) * 0.05))
        for name, value in sorted(tree_flatten(model.trainable_parameters()))
    ]
    model.update(tree_unflatten(values))
    model.eval()
    target.mkdir(parents=True, exist_ok=True)
    if save:
        mx.save_safetensors(str(target / "adapters.safetensors"), dict(values))
        config = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "model": "base"}
        (target / "adapter_config.json").write_text(json.dumps(config))
    return target


def logits(model: Any) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)))


def their_fuse(model: Any) -> Any:
    """What mlx_lm.fuse does."""
    layers = [(name, module.fuse()) for name, module in model.named_modules() if hasattr(module, "fuse")]
    model.update_modules(tree_unflatten(layers))
    return model


KEYS = {"all": None, "some": ["self_attn.q_proj", "linear_attn.out_proj", "mlp.gate_proj", "mlp.switch_mlp.up_proj"]}


@pytest.mark.parametrize("keys", KEYS)
def test_reads_what_mlx_lm_trained(folder: Path, tmp_path: Path, keys: str) -> None:
    theirs = peer.load_model(folder)[0]
    plain = logits(theirs)
    adapter = trained(theirs, tmp_path / "adapter", keys=KEYS[keys])
    ours = load_adapter(mlx_qwen35.load_model(folder), adapter)
    assert np.abs(logits(ours) - logits(theirs)).max() <= TOLERANCE
    assert np.abs(logits(ours) - plain).max() > 0.1
    assert not any(module.training for module in ours.modules() if hasattr(module, "lora_a"))


def test_fuses_as_mlx_lm_does(folder: Path, tmp_path: Path) -> None:
    theirs = peer.load_model(folder)[0]
    adapter = trained(theirs, tmp_path / "adapter")
    ours = fuse(load_adapter(mlx_qwen35.load_model(folder), adapter))
    apart = np.abs(logits(ours) - logits(their_fuse(theirs))).max()
    assert apart <= TOLERANCE
    kinds = {type(module) for module in mlx_qwen35.load_model(folder).modules()}
    assert {type(module) for module in ours.modules()} == kinds


def test_without_mlx_lm_it_is_refused_before_weights_are_read_and_still_merged(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = peer.load_model(folder)[0]
    adapter = trained(theirs, tmp_path / "adapter")
    model = mlx_qwen35.load_model(folder)
    monkeypatch.setitem(sys.modules, "mlx_lm", None)
    with pytest.raises(CheckpointError, match=r"mlx-lm, which is not installed: pip install mlx-lm, or merge it"):
        load_adapter(model, adapter)
    with monkeypatch.context() as only, pytest.raises(CheckpointError, match="pip install mlx-lm"):
        only.setattr(loading, "load_held", None)  # not reached
        only.setattr(loading, "load_processor", lambda *_, **__: None)  # these have no tokenizer
        mlx_qwen35.load(folder, adapter_path=adapter)
    merged = mlx_qwen35.convert(folder, tmp_path / "merged", bits=None, dtype="float32", adapter_path=adapter)
    assert np.abs(logits(mlx_qwen35.load_model(merged)) - logits(theirs)).max() <= TOLERANCE


@pytest.mark.parametrize("way", ["kept", "fused"])
def test_dora(folder: Path, tmp_path: Path, way: str) -> None:
    """mlx-lm has no DoRA for experts: they are left out there."""
    keys = ["self_attn.q_proj", "self_attn.o_proj", "linear_attn.in_proj_qkv", "mlp.down_proj", "mlp.gate"]
    theirs = peer.load_model(folder)[0]
    adapter = trained(theirs, tmp_path / "adapter", kind="dora", keys=keys)
    ours = load_adapter(mlx_qwen35.load_model(folder), adapter)
    if way == "fused":
        ours, theirs = fuse(ours), their_fuse(theirs)
    assert np.abs(logits(ours) - logits(theirs)).max() <= TOLERANCE


def test_mlx_lm_reads_what_was_trained_on_our_model(folder: Path, tmp_path: Path) -> None:
    ours = mlx_qwen35.load_model(folder)
    trained(ours, tmp_path / "own", keys=None)
    save_adapter(ours, tmp_path / "adapter", base=folder)
    theirs = their_load(peer.load_model(folder)[0], str(tmp_path / "adapter"))
    theirs.eval()
    assert np.abs(logits(ours) - logits(theirs)).max() <= TOLERANCE
    again = load_adapter(mlx_qwen35.load_model(folder), tmp_path / "adapter")
    assert np.array_equal(logits(again), logits(ours))
    raw = load_adapter(mlx_qwen35.load_model(folder), tmp_path / "own")  # under our names, as the trainer wrote it
    assert np.array_equal(logits(raw), logits(ours))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_config("dense", **SIZES, **FFN["dense"])
    return write_checkpoint(tmp_path_factory.mktemp("dense") / "hf", config, random_tensors(config, 3))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "own head"])
def test_embedding_and_head(tmp_path: Path, tied: bool) -> None:
    config = tiny_config("dense", **SIZES, **FFN["dense"], tie_word_embeddings=tied)
    folder = write_checkpoint(tmp_path / "hf", config, random_tensors(config, 3))
    keys = ["language_model.model.embed_tokens"] + ([] if tied else ["language_model.lm_head"])
    theirs = peer.load_model(folder)[0]
    adapter = trained(theirs, tmp_path / "adapter", keys=keys)
    ours = load_adapter(mlx_qwen35.load_model(folder), adapter)
    assert np.abs(logits(ours) - logits(theirs)).max() <= TOLERANCE
    assert np.abs(logits(fuse(ours)) - logits(theirs)).max() <= TOLERANCE


def test_whole_layers(dense: Path, tmp_path: Path) -> None:
    """fine_tune_type full: the weights of the last layers, which replace the model's."""
    theirs = peer.load_model(dense)[0]
    theirs.freeze()
    theirs.layers[-1].unfreeze()
    values = [(name, value * 1.5) for name, value in tree_flatten(theirs.trainable_parameters())]
    theirs.update(tree_unflatten(values))
    mx.save_safetensors(str(tmp_path / "adapters.safetensors"), dict(values))
    (tmp_path / "adapter_config.json").write_text('{"fine_tune_type": "full", "lora_parameters": null}')
    written = mlx_qwen35.convert(dense, tmp_path / "fused", bits=None, adapter_path=tmp_path)
    assert np.abs(logits(mlx_qwen35.load_model(written)) - logits(theirs)).max() <= TOLERANCE
    ours = load_adapter(mlx_qwen35.load_model(dense), tmp_path)
    assert np.abs(logits(ours) - logits(theirs)).max() <= TOLERANCE


def test_load_puts_it_on(dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_qwen35.library import loading

    adapter = trained(peer.load_model(dense)[0], tmp_path / "adapter")
    monkeypatch.setattr(loading.Processor, "from_folder", classmethod(lambda cls, *given: given))
    model, _ = mlx_qwen35.load(dense, adapter_path=adapter)
    assert any(hasattr(module, "lora_a") for module in model.modules())
    read: list[Any] = []
    with pytest.raises(CheckpointError, match="no adapter_config.json"):
        mlx_qwen35.load(dense, adapter_path=tmp_path / "none", on_progress=lambda *counts: read.append(counts))
    assert read == [], "an adapter that is not there is found out before weights are read"


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--adapter-path: another answer than the model's own."""
    from mlx_qwen35.cli.main import main
    from tests.text.folders import write_text_files

    config = tiny_config("dense", **SIZES, **FFN["dense"], vocab_size=320, eos_token_id=319)
    folder = write_text_files(write_checkpoint(tmp_path / "hf", config, random_tensors(config, 3)))
    adapter = trained(peer.load_model(folder)[0], tmp_path / "adapter")
    asked = ["generate", "--model", str(folder), "-p", "hello", "-n", "8", "--temp", "0"]
    answers = []
    for flags in ([], ["--adapter-path", str(adapter)]):
        assert main([*asked, *flags]) == 0
        answers.append(capsys.readouterr().out)
    assert answers[0] != answers[1]
    assert main([*asked, "--adapter-path", str(folder)]) == 2
    assert "no adapter_config.json" in capsys.readouterr().err


def everything(model: Any, target: Path, kind: str = "lora") -> Path:
    """An adapter of all layers, of the embedding and of the head if the model has one of its own."""
    keys = [
        "self_attn.q_proj", "self_attn.o_proj", "linear_attn.in_proj_qkv", "linear_attn.in_proj_a", "mlp.down_proj",
        "mlp.gate", "mlp.shared_expert.up_proj", "mlp.shared_expert_gate", "language_model.model.embed_tokens",
        "language_model.lm_head",
    ]  # fmt: skip
    keys += ["mlp.switch_mlp.down_proj", "mlp.switch_mlp.gate_proj"] if kind == "lora" else []
    return trained(model, target, kind=kind, layers=4, keys=keys)


@pytest.mark.parametrize("kind", ["lora", pytest.param("dora", marks=pytest.mark.soak)])
def test_converts_with_an_adapter(folder: Path, tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written is what the model with the adapter computes; quantized once, from the sum in float32."""
    monkeypatch.setattr(task, "PIECE_BYTES", 4000)  # some rows of each tensor at a time
    theirs = peer.load_model(folder)[0]
    if kind == "dora" and hasattr(theirs.layers[0].linear_attn.in_proj_qkv, "bits"):
        keys = ["self_attn.q_proj", "linear_attn.in_proj_qkv", "mlp.gate"]  # mlx-lm has no DoRA of quantized embeddings
        adapter = trained(theirs, tmp_path / "adapter", kind=kind, layers=4, keys=keys)
    else:
        adapter = everything(theirs, tmp_path / "adapter", kind)
    written = mlx_qwen35.convert(folder, tmp_path / "fused", bits=None, dtype="float32", adapter_path=adapter)
    assert np.abs(logits(mlx_qwen35.load_model(written)) - logits(theirs)).max() <= TOLERANCE
    assert np.abs(logits(peer.load_model(written)[0]) - logits(theirs)).max() <= TOLERANCE
    eight = {"bits": 8, "group_size": 32, "recipe": "uniform"}
    packed = mlx_qwen35.convert(folder, tmp_path / "packed", adapter_path=adapter, **eight)
    again = mlx_qwen35.convert(written, tmp_path / "again", **eight)
    # The median, because a router may choose another expert where two are as good.
    assert np.median(np.abs(logits(mlx_qwen35.load_model(packed)) - logits(mlx_qwen35.load_model(again)))) <= 0.05


def test_converting_goes_on_with_the_same_adapter_only(dense: Path, tmp_path: Path) -> None:
    adapter = trained(peer.load_model(dense)[0], tmp_path / "adapter")

    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mlx_qwen35.convert(dense, tmp_path / "fused", bits=None, adapter_path=adapter, on_progress=stop)
    with pytest.raises(CheckpointError):
        mlx_qwen35.convert(dense, tmp_path / "fused", bits=None, resume=True)
    mlx_qwen35.convert(dense, tmp_path / "fused", bits=None, adapter_path=adapter, resume=True)
    fused = load_adapter(mlx_qwen35.load_model(dense), adapter)
    assert np.abs(logits(mlx_qwen35.load_model(tmp_path / "fused")) - logits(fused)).max() <= TOLERANCE
    other = tiny_config("dense", **SIZES, intermediate_size=96)
    other_folder = write_checkpoint(tmp_path / "other", other, random_tensors(other, 3))
    with pytest.raises(CheckpointError, match="trained on another model"):
        mlx_qwen35.convert(other_folder, tmp_path / "no", adapter_path=adapter)
    assert not (tmp_path / "no").exists()


class TestErrors:
    @pytest.fixture
    def adapter(self, dense: Path, tmp_path: Path) -> Path:
        return trained(peer.load_model(dense)[0], tmp_path / "adapter")

    def change(self, adapter: Path, edit: Callable[[dict[str, mx.array]], None]) -> None:
        tensors = dict(mx.load(str(adapter / "adapters.safetensors")))
        edit(tensors)
        mx.save_safetensors(str(adapter / "adapters.safetensors"), tensors)

    def refused(self, dense: Path, adapter: Path, message: str) -> None:
        model = mlx_qwen35.load_model(dense)
        before = logits(model)
        with pytest.raises(CheckpointError, match=message):
            load_adapter(model, adapter)
        assert np.array_equal(logits(model), before)

    def test_of_another_model(self, dense: Path, adapter: Path) -> None:
        def grow(tensors: dict[str, mx.array]) -> None:
            for name in [name for name in tensors if name.endswith("lora_a")]:
                tensors[name] = mx.concatenate([tensors[name], tensors[name]])

        self.change(adapter, grow)
        self.refused(dense, adapter, r"another model: layers\.[23]\..*lora_a is \[128, 3\], the model needs \[64, 3\]")

    def test_a_name_that_is_not_there(self, dense: Path, adapter: Path) -> None:
        def more(tensors: dict[str, mx.array]) -> None:
            for leaf in ("lora_a", "lora_b"):
                tensors[f"language_model.model.layers.9.mlp.up_proj.{leaf}"] = mx.zeros((3, 3))

        self.change(adapter, more)
        self.refused(dense, adapter, r"layers\.9\.mlp\.up_proj: the model has no linear map")

    @pytest.mark.parametrize("leaf", ["lora_a", "lora_b"])
    def test_half_an_adapter(self, dense: Path, adapter: Path, leaf: str) -> None:
        name = f"language_model.model.layers.3.self_attn.q_proj.{leaf}"
        self.change(adapter, lambda tensors: tensors.__delitem__(name))
        self.refused(dense, adapter, rf"q_proj\.{leaf} is missing")

    def test_no_numbers(self, dense: Path, adapter: Path) -> None:
        name = "language_model.model.layers.3.self_attn.q_proj.lora_a"
        self.change(adapter, lambda tensors: tensors.update({name: tensors[name] / 0}))
        self.refused(dense, adapter, "q_proj.lora_a holds NaN or infinite")

    def test_another_rank_than_it_says(self, dense: Path, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        config["lora_parameters"]["rank"] = 8
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        self.refused(dense, adapter, r"the model needs \[\d+, 8\]")
        config["lora_parameters"]["rank"] = "8"
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        self.refused(dense, adapter, "lora_parameters.rank is '8'")

    def test_broken_files(self, dense: Path, adapter: Path) -> None:
        weights = (adapter / "adapters.safetensors").read_bytes()
        (adapter / "adapters.safetensors").write_bytes(weights[:-10])
        self.refused(dense, adapter, "adapters.safetensors")
        (adapter / "adapters.safetensors").unlink()
        self.refused(dense, adapter, "has no adapters.safetensors")
        (adapter / "adapter_config.json").write_text("{")
        self.refused(dense, adapter, "adapter_config.json cannot be read")
        (adapter / "adapter_config.json").write_text("{}")
        (adapter / "adapter_model.safetensors").touch()
        self.refused(dense, adapter, "adapter_model.safetensors cannot be read")

    def test_twice(self, dense: Path, adapter: Path) -> None:
        model = load_adapter(mlx_qwen35.load_model(dense), adapter)
        with pytest.raises(CheckpointError, match="has an adapter already"):
            load_adapter(model, adapter)
        load_adapter(fuse(model), adapter)

    def test_nothing_to_save(self, dense: Path, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="has no adapter"):
            save_adapter(mlx_qwen35.load_model(dense), tmp_path)

    def test_kinds(self, adapter: Path) -> None:
        read = read_adapter(adapter)
        assert (read.kind, read.rank, read.scale, read.dropout) == ("lora", 3, 4.0, 0.1)
        (adapter / "adapter_config.json").write_text('{"fine_tune_type": "ia3"}')
        with pytest.raises(CheckpointError, match="'ia3'; it must be one of lora, dora, full"):
            read_adapter(adapter)
