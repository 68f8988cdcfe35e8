"""MLX checkpoints as they are published: every form computes what the same values unquantized do, or says why not."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint import packing
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError, Qwen35Warning
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.kernels.weights import Weights
from tests.checkpoint.forms import Form, autoround_mlx, oq, pack
from tests.checkpoints import relayout

TOKENS = mx.array([[5, 9, 77, 33, 20, 4, 8]])
kinds = pytest.mark.parametrize("kind", ["dense", "moe"])
sight = pytest.mark.parametrize("vision", [False, True], ids=["text", "seeing"])


def logits(folder: Path, **how: Any) -> mx.array:
    return load_model(folder, dtype="float32", **how)(TOKENS)


def assert_same(folder: Path, form: Form, **how: Any) -> None:
    """Logits, the tower's weights and the MTP head are those of the plain model."""
    plain = form.write_plain(folder.parent / "plain")
    assert mx.abs(logits(folder, **how) - logits(plain)).max().item() < 2e-3
    model, other = (load_model(path, dtype="float32") for path in (folder, plain))
    assert (model.config.vision is None) == (other.config.vision is None)
    if model.config.vision is not None:
        assert mx.array_equal(model.vision.patch_embed.proj.weight, other.vision.patch_embed.proj.weight)
    assert_same_head(folder, plain, model.config)


def guesses(folder: Path, config: ModelConfig) -> mx.array:
    hidden = mx.random.normal((1, 6, config.text.hidden_size), key=mx.random.key(1))
    embeddings = mx.random.normal(hidden.shape, key=mx.random.key(2))
    return load_mtp(folder, config, dtype="float32")(embeddings, hidden, mx.arange(6)[None])


def assert_same_head(folder: Path, plain: Path, config: ModelConfig) -> None:
    assert mx.abs(guesses(folder, config) - guesses(plain, config)).max().item() < 2e-3


def in_shards(name: str) -> str:
    return f"model-0000{1 + sum(map(ord, name)) % 3}-of-00003.safetensors"


@kinds
@sight
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_oq_with_its_head_in_the_main_shards(tmp_path: Path, kind: str, vision: bool, sharded: bool) -> None:
    form = oq(kind, vision=vision)
    form.write(tmp_path / "a", in_shards if sharded else None, index=sharded)
    assert_same(tmp_path / "a", form)


@kinds
@sight
@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
def test_autoround_as_mlx(tmp_path: Path, kind: str, vision: bool, sharded: bool) -> None:
    form = autoround_mlx(kind, vision=vision)
    form.write(tmp_path / "a", in_shards if sharded else None, index=sharded)
    assert_same(tmp_path / "a", form)


@kinds
@pytest.mark.parametrize("make", [oq, autoround_mlx])
@pytest.mark.parametrize("bits", [None, 8], ids=["unquantized", "8 bits"])
def test_conversion_of_these_forms(tmp_path: Path, kind: str, make: Callable[..., Form], bits: int | None) -> None:
    form = make(kind, vision=True)
    form.write(tmp_path / "a")
    recipe = None if bits is None else "uniform"
    out = convert(tmp_path / "a", tmp_path / "b", bits=bits, recipe=recipe, dtype="float32", verify=True)
    if bits is None:
        assert_same(out, form)
    assert mx.abs(logits(out) - logits(tmp_path / "a")).max().item() < (1e-3 if bits is None else 2)
    config = ModelConfig.from_folder(out)
    assert_same_head(out, tmp_path / "a", config)


def hf_path(path: str) -> str:
    path = path.replace("language_model.model.", "model.language_model.").replace("vision_tower.", "model.visual.")
    return path.replace("language_model.lm_head", "lm_head").replace("language_model.mtp.", "mtp.")


SPELLINGS: dict[str, Callable[[str], str]] = {
    "as the tensors": lambda path: path,
    "Hugging Face's": hf_path,
    "without the roof": lambda path: path.removeprefix("language_model."),
    "without any": lambda path: path.removeprefix("language_model.").removeprefix("model."),
    "experts as Hugging Face's": lambda path: hf_path(path).replace("switch_mlp", "experts"),
}


@kinds
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("make", [oq, autoround_mlx])
def test_entries_in_any_spelling(tmp_path: Path, kind: str, spelling: str, make: Callable[..., Form]) -> None:
    form = make(kind)
    form.quantization({"group_size": 64, "bits": 4}, {SPELLINGS[spelling](p): s for p, s in form.entries.items()})
    assert_same(form.write(tmp_path / "a"), form)


@kinds
@pytest.mark.parametrize("make", [oq, autoround_mlx])
@pytest.mark.parametrize("default", [{"group_size": 64, "bits": 4}, {"group_size": 128, "bits": 2}], ids=str)
def test_bits_that_only_the_shapes_tell(
    tmp_path: Path, kind: str, make: Callable[..., Form], default: dict[str, int]
) -> None:
    form = make(kind)
    form.quantization(default, {})
    assert_same(form.write(tmp_path / "a"), form)


@kinds
def test_modes_that_only_the_shapes_tell(tmp_path: Path, kind: str) -> None:
    """Each of the other modes has one number of bits and one size of groups."""
    modes = {"q_proj": ("mxfp4", 4, 32), "o_proj": ("mxfp8", 8, 32), "up_proj": ("nvfp4", 4, 16)}

    def spec_of(path: str) -> dict[str, Any] | None:
        if "vision" in path:
            return None
        mode, bits, group = modes.get(path.rpartition(".")[2], ("affine", 5, 64))
        return {"mode": mode, "bits": bits, "group_size": group}

    form = oq(kind, bits=spec_of)
    form.quantization({"group_size": 64, "bits": 4}, {})
    assert_same(form.write(tmp_path / "a"), form)


def test_an_entry_without_its_group_size(tmp_path: Path) -> None:
    form = autoround_mlx("dense")
    form.quantization({"group_size": 64, "bits": 4},
                      {p: {"bits": s["bits"]} if s else False for p, s in form.entries.items()})  # fmt: skip
    assert_same(form.write(tmp_path / "a"), form)


UP = "language_model.model.layers.0.mlp.up_proj"
CONTRADICTIONS: dict[str, tuple[dict[str, Any], str]] = {
    "bits": ({hf_path(UP): {"group_size": 64, "bits": 8}}, r"up_proj.weight .*\[320, 16\], expected \[320, 32\]"),
    "bits without groups": ({hf_path(UP): {"bits": 8}}, r"up_proj.weight .*\[320, 16\], expected \[320, 32\]"),
    "not quantized": ({"layers.0.mlp.up_proj": False}, "up_proj.scales .* is there, but .* is not quantized"),
    "two spellings": (
        {UP: {"group_size": 64, "bits": 4}, hf_path(UP): {"group_size": 64, "bits": 8}},
        "4 bits in groups of 64 .affine. of language.* and 8 bits .* of model.*, which are the same module",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_entries_that_contradict_are_refused(tmp_path: Path, case: str) -> None:
    entries, message = CONTRADICTIONS[case]
    form = oq("dense")
    form.quantization({"group_size": 64, "bits": 4}, form.entries | entries)
    with pytest.raises(CheckpointError, match=message):
        load_model(form.write(tmp_path / "a"))


def test_experts_that_config_tells_apart_are_refused(tmp_path: Path) -> None:
    """They are one module here; their shapes could not differ either."""
    form = autoround_mlx("moe")
    one = "model.language_model.layers.0.mlp.experts.{}.up_proj"
    form.entries |= {one.format(0): {"group_size": 64, "bits": 4}, one.format(1): {"group_size": 64, "bits": 8}}
    form.quantization({"group_size": 64, "bits": 4}, form.entries)
    with pytest.raises(CheckpointError, match=r"experts.0.up_proj and 8 bits .*experts.1.up_proj, which are the same"):
        load_model(form.write(tmp_path / "a"))


def test_shapes_that_no_quantization_has(tmp_path: Path) -> None:
    form = oq("dense")
    form.arrays[f"{UP}.weight"] = mx.zeros((320, 28), mx.uint32)  # 7 bits
    with pytest.raises(CheckpointError, match=r"up_proj.weight .*\[320, 28\], expected \[320, 16\]"):
        load_model(form.write(tmp_path / "a"))


def one_bit(path: str) -> dict[str, Any] | None:
    outside = path.startswith("vision") or path.endswith(("in_proj_a", "in_proj_b", ".gate", "shared_expert_gate"))
    return None if outside else {"group_size": 64, "bits": 1}


@kinds
def test_one_bit(tmp_path: Path, kind: str) -> None:
    """mx.quantize rounds to one bit as it does to more; such models are trained so."""
    form = oq(kind, bits=one_bit)
    form.write(tmp_path / "a")
    assert_same(tmp_path / "a", form)
    out = convert(tmp_path / "a", tmp_path / "b", bits=8, dtype="float32")
    before, after = (open_source(folder) for folder in (tmp_path / "a", out))
    carried = [module for module, spec in before.specs.items() if spec.bits == 1]
    assert len(carried) > 10 and all(after.specs[module] == before.specs[module] for module in carried)
    plain = convert(tmp_path / "a", tmp_path / "c", bits=None, dtype="float32", verify=True)
    assert mx.abs(logits(plain) - logits(tmp_path / "a")).max().item() < 1e-3


def test_kernels_leave_one_bit_to_mlx() -> None:
    packed = mx.quantize(mx.ones((32, 128)), group_size=64, bits=1)
    assert Weights.of(*packed, group_size=64, bits=1, mode="affine") is None


def test_one_bit_in_groups_of_128(tmp_path: Path) -> None:
    def spec_of(path: str) -> dict[str, Any] | None:
        return {"group_size": 128, "bits": 1} if path.endswith(("q_proj", "k_proj", "in_proj_qkv")) else None

    form = oq("dense", bits=spec_of)
    form.quantization({"group_size": 128, "bits": 1}, {})
    assert_same(form.write(tmp_path / "a"), form)


def test_experts_of_one_bit_from_the_disk(tmp_path: Path) -> None:
    form = oq("moe", bits=one_bit)
    form.write(tmp_path / "a")
    plan = StreamPlan(slots=(3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    streamed = load_model(tmp_path / "a", dtype="float32", stream=plan)
    assert mx.array_equal(streamed(TOKENS), logits(tmp_path / "a"))
    streamed.unload()


def test_experts_of_autoround_from_the_disk(tmp_path: Path) -> None:
    """Each expert is three modules of its own there."""
    form = autoround_mlx("moe")
    form.write(tmp_path / "a", in_shards, index=True)
    plan = StreamPlan(slots=(3, 3), group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    streamed = load_model(tmp_path / "a", dtype="float32", stream=plan)
    assert mx.array_equal(streamed(TOKENS), logits(tmp_path / "a"))
    streamed.unload()


def test_one_bit_needs_a_version_of_mlx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = oq("dense", bits=one_bit)
    form.write(tmp_path / "a")
    monkeypatch.setattr(packing.mx, "__version__", "0.32.3")
    with pytest.raises(CheckpointError, match="weights of 1 bit, which MLX computes with from 0.32.4 on; this is MLX"):
        load_model(tmp_path / "a")
    oq("dense").write(tmp_path / "b")
    load_model(tmp_path / "b")


TOWERS: dict[str, tuple[str, bool]] = {  # where OptiQ has put it, and whether the index names it
    "root": ("optiq_vision.safetensors", True),
    "folder": ("optiq/optiq_vision.safetensors", True),
    "root, silent": ("optiq_vision.safetensors", False),
    "folder, silent": ("optiq/optiq_vision.safetensors", False),
}


@kinds
@pytest.mark.parametrize("case", TOWERS)
def test_optiq(tmp_path: Path, kind: str, case: str) -> None:
    place, named = TOWERS[case]
    form = oq(kind, vision=True)

    def file_of(name: str) -> str:
        return place if name.startswith("vision_tower.") else in_shards(name)

    form.write(tmp_path / "a", file_of, index=True)
    if not named:
        path = tmp_path / "a/model.safetensors.index.json"
        told = json.loads(path.read_text())
        told["weight_map"] = {n: f for n, f in told["weight_map"].items() if f != place}
        path.write_text(json.dumps(told))
    assert_same(tmp_path / "a", form)
    load_model(convert(tmp_path / "a", tmp_path / "b", bits=4))


def test_a_tower_under_a_name_of_its_own(tmp_path: Path) -> None:
    form = oq("dense", vision=True)
    form.config["optiq_vision"] = {"sidecar": "towers/eyes.safetensors"}
    form.write(tmp_path / "a", lambda n: "towers/eyes.safetensors" if n.startswith("vision") else "model.safetensors")
    assert_same(tmp_path / "a", form)
    form.config["optiq_vision"] = {"sidecar": "../a/towers/eyes.safetensors"}  # nothing outside is read
    form.write(tmp_path / "a", lambda n: "towers/eyes.safetensors" if n.startswith("vision") else "model.safetensors")
    with pytest.warns(Qwen35Warning, match="text only"):
        assert load_model(tmp_path / "a").config.vision is None


def test_no_tower_is_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    form = oq("dense", vision=True)
    form.write(tmp_path / "a")
    load_model(tmp_path / "a")
    assert not [w for w in recwarn if w.category is Qwen35Warning]
    form.arrays = {name: array for name, array in form.arrays.items() if not name.startswith("vision")}
    form.write(tmp_path / "b")
    with pytest.warns(Qwen35Warning, match="describes a vision tower, and none of its files holds one.*text only"):
        load_model(tmp_path / "b")


@pytest.mark.parametrize("names", [["weights.00.safetensors", "weights.01.safetensors"], ["qwen.safetensors"]], ids=str)
def test_other_names_of_files(tmp_path: Path, names: list[str]) -> None:
    form = oq("moe")
    form.write(tmp_path / "a", lambda name: names[sum(map(ord, name)) % len(names)])
    for stranger in ("consolidated.safetensors", "optimizer.safetensors", "adapters.safetensors", "mmproj.safetensors"):
        mx.save_safetensors(str(tmp_path / "a" / stranger), {"x": mx.zeros(3)})
    assert_same(tmp_path / "a", form)


@pytest.mark.parametrize("file", ["/etc/a.safetensors", "a/../../b.safetensors", "a\\b.safetensors", "c:/a.safetensors",
                                  "./a.safetensors", "a//b.safetensors"])  # fmt: skip
def test_an_index_names_nothing_outside(tmp_path: Path, file: str) -> None:
    oq("dense").write(tmp_path / "a")
    index = {"weight_map": {"language_model.model.norm.weight": file}}
    (tmp_path / "a/model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="no name of a shard in or below its folder"):
        load_model(tmp_path / "a")


def test_mixed_forms(tmp_path: Path) -> None:
    """Plain names without a marker, entries of another spelling, the head under its roof, the tower Hugging Face's."""
    form = oq("moe", vision=True)
    names = {name: name.removeprefix("language_model.") for name in form.arrays if ".mtp." not in name}
    names = {n: m.replace("vision_tower.", "model.visual.") for n, m in names.items()}
    form.arrays = {names.get(name, name): array for name, array in form.arrays.items()}
    form.marker = None
    form.quantization({"group_size": 64, "bits": 4}, {hf_path(path): spec for path, spec in form.entries.items()})
    assert_same(form.write(tmp_path / "a"), form)


@kinds
@pytest.mark.parametrize("make", [oq, autoround_mlx])
def test_text_alone_with_short_names(tmp_path: Path, kind: str, make: Callable[..., Form]) -> None:
    """A flat config, and names without a roof, as a text-only export has them."""
    form = make(kind)
    names = {n: n.replace("model.language_model.", "model.").removeprefix("language_model.") for n in form.arrays}
    form.arrays = {names[name]: array for name, array in form.arrays.items()}
    form.write(tmp_path / "nested")
    text = form.config.pop("text_config")
    kept = {key: form.config[key] for key in ("quantization", "quantization_config", "architectures")}
    form.config = {**text, **kept, "model_type": f"qwen3_5{'_moe' if kind == 'moe' else ''}_text"}
    form.write(tmp_path / "flat")
    assert mx.array_equal(logits(tmp_path / "flat"), logits(tmp_path / "nested"))
    assert_same_head(tmp_path / "flat", tmp_path / "nested", ModelConfig.from_folder(tmp_path / "flat"))
    out = convert(tmp_path / "flat", tmp_path / "b", bits=None, dtype="float32")
    assert mx.abs(logits(out) - logits(tmp_path / "flat")).max().item() < 1e-3


def test_a_head_in_a_second_file_without_an_index(tmp_path: Path) -> None:
    form = oq("moe")
    form.write(tmp_path / "a", lambda name: "model-mtp.safetensors" if ".mtp." in name else "model.safetensors")
    assert_same(tmp_path / "a", form)


def test_a_checkpoint_with_two_heads_or_towers_is_refused(tmp_path: Path) -> None:
    form = oq("dense", vision=True)
    form.arrays["mtp.norm.weight"] = mx.ones(128)
    with pytest.raises(CheckpointError, match="its MTP layer twice"):
        load_model(form.write(tmp_path / "a"))
    form = oq("dense", vision=True)
    form.arrays["model.visual.merger.norm.bias"] = mx.ones(24)
    with pytest.raises(CheckpointError, match="its vision tower twice"):
        load_model(form.write(tmp_path / "b"))


def test_peers_read_what_is_written_here(tmp_path: Path) -> None:
    """The builders of these forms against mlx-lm, which reads them too."""
    lm = pytest.importorskip("mlx_lm.utils")
    forms = [oq("dense"), oq("moe"), autoround_mlx("dense")]
    text = forms[2].config["text_config"]  # mlx-lm knows no rope keys but those of the section
    text["rope_parameters"] = {key: text[key] for key in ("rope_theta", "partial_rotary_factor", "mrope_section")}
    for number, form in enumerate(forms):
        folder = form.write(tmp_path / str(number))
        model, _ = lm.load_model(folder)
        model.set_dtype(mx.float32)
        assert np.abs(np.array(model(TOKENS)) - np.array(logits(folder))).max() < 5e-3


@kinds
@pytest.mark.parametrize("make", [oq, autoround_mlx])
def test_mlx_vlm_reads_the_same(tmp_path: Path, kind: str, make: Callable[..., Form]) -> None:
    vlm = pytest.importorskip("mlx_vlm.utils")
    form = make(kind, vision=True)
    text = form.config["text_config"]  # it knows no rope keys but those of the section either
    rope = text.get("rope_parameters", text)
    text["rope_parameters"] = {k: rope[k] for k in ("rope_theta", "partial_rotary_factor", "mrope_section")}
    text["rope_parameters"]["type"] = "default"
    folder = form.write(tmp_path / "a")
    theirs = vlm.load_model(folder).language_model(TOKENS).logits
    assert np.abs(np.array(theirs.astype(mx.float32)) - np.array(logits(folder))).max() < 2e-3


def test_packed_values_are_what_they_stand_for() -> None:
    arrays, specs, values = pack({"a.weight": np.ones((4, 64), np.float32)}, lambda path: {"group_size": 64, "bits": 4})
    assert set(arrays) == {"a.weight", "a.scales", "a.biases"} and specs["a"]["bits"] == 4
    assert np.abs(values["a.weight"] - 1).max() < 1e-6
    assert relayout({}, "mlx") == {}
