"""One model from every layout, exactly; everything that does not fit is named before a weight is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint import files
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.config import Yarn
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import (
    Tensors,
    loaded,
    random_tensors,
    relayout,
    tiny_config,
    write_checkpoint,
    write_safetensors,
)

LAYOUTS = ["hf", "hf-per-expert", "mlx", "mlx-text"]


def weights(model: Any) -> dict[str, np.ndarray]:
    return {name: np.array(value.astype(mx.float32)) for name, value in tree_flatten(model.parameters())}


def make(folder: Path, kind: str = "dense", *, change: Callable[[Tensors], Any] | None = None, **how: Any) -> Path:
    """A checkpoint with vision and MTP tensors; `change` edits its HF tensors before they are written."""
    sizes = how.pop("sizes", {})
    config = tiny_config(kind, vision=True, mtp_num_hidden_layers=1, **sizes)
    tensors = random_tensors(config, 3)
    if how.get("layout") == "mlx-text":  # which has no vision tower
        config.pop("vision_config")
        tensors = {name: value for name, value in tensors.items() if "visual" not in name}
    if change:
        change(tensors)
    return write_checkpoint(folder, config, tensors, **how)


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_the_same_model(tmp_path: Path, kind: str, layout: str) -> None:
    model = load_model(make(tmp_path / "a", kind, layout=layout, shards=3))
    config = tiny_config(kind, vision=layout != "mlx-text")
    meant = dict(loaded(name, value) for name, value in relayout(random_tensors(config, 3), "mlx").items())
    found = weights(model)
    assert found.keys() == meant.keys()
    for name, value in found.items():
        assert np.array_equal(value, meant[name]), name


def test_norms_are_shifted_once(tmp_path: Path) -> None:
    def zero(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(("layernorm.weight", "_norm.weight", "language_model.norm.weight")):
                tensors[name] = np.zeros_like(tensors[name])

    for layout in ("hf", "mlx"):
        found = weights(load_model(make(tmp_path / layout, layout=layout, change=zero)))
        ones = [name for name in found if name.endswith(("layernorm.weight", "_norm.weight")) or name == "norm.weight"]
        assert len(ones) == 4 * 2 + 2 + 1
        assert all((found[name] == 1).all() for name in ones)
        assert (found["layers.0.linear_attn.norm.weight"] != 1).all()


def test_shift_is_added_in_float32(tmp_path: Path) -> None:
    """1 + w of a bfloat16 file, computed in float32, keeps digits that bfloat16 would drop."""

    def small(tensors: Tensors) -> None:
        tensors["model.language_model.norm.weight"][:] = 2.0**-12

    folder = make(tmp_path / "a", change=small, dtype="bfloat16")
    assert (weights(load_model(folder))["norm.weight"] == 1 + 2.0**-12).all()
    assert (weights(load_model(folder, dtype="bfloat16"))["norm.weight"] == 1).all()


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("compute", [None, "float32", "bfloat16", mx.float16])
def test_dtypes(tmp_path: Path, stored: str, compute: Any) -> None:
    model = load_model(make(tmp_path / "a", dtype=stored), dtype=compute)
    wanted = {None: mx.float32, "float32": mx.float32, "bfloat16": mx.bfloat16}.get(compute, mx.float16)
    for name, value in tree_flatten(model.parameters()):
        # A_log is float32 in every one of these files, dt_bias as the rest.
        kept = name.endswith("A_log") or (name.endswith("dt_bias") and stored == "float32")
        assert value.dtype == (mx.float32 if kept else wanted), name


def test_no_dtype_to_compute_in(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="choose float32, float16, bfloat16"):
        load_model(tmp_path, dtype="int8")


def test_loaded_model_computes(tmp_path: Path) -> None:
    tokens = mx.array([[1, 5, 80, 3]])
    hf = load_model(make(tmp_path / "a", "moe"))(tokens)
    mlx = load_model(make(tmp_path / "b", "moe", layout="mlx"))(tokens)
    assert mx.array_equal(hf, mlx)
    assert mx.abs(hf).max().item() > 0.1


def test_progress(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "moe", shards=2)
    seen: list[tuple[int, int]] = []
    load_model(folder, on_progress=lambda done, total: seen.append((done, total)))
    read = [e for n, e in files.open_folder(folder).entries.items() if not n.startswith("mtp")]
    total = sum(entry.nbytes for entry in read)
    assert seen[0] == (0, total) and seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("described", [True, False])
def test_what_is_not_used_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, described: bool) -> None:
    """MTP, and a vision tower that config.json does not describe."""
    touched = []
    original = files.read
    monkeypatch.setattr(files, "read", lambda entry, *a, **k: touched.append(entry.name) or original(entry, *a, **k))
    folder = make(tmp_path / "a")
    if not described:
        edit_config(folder, lambda config: config.pop("vision_config"))
    model = load_model(folder)
    seen = [name for name in touched if name.startswith("model.visual")]
    assert touched and not [name for name in touched if name.startswith("mtp")]
    assert bool(seen) == described == ("vision" in model) == (model.config.vision is not None)


@pytest.mark.parametrize("layout", ["hf", "mlx"])
def test_a_described_tower_that_is_nowhere_makes_a_text_model(tmp_path: Path, layout: str) -> None:
    """As mlx-lm writes checkpoints: config.json goes over as it is, the tower does not."""

    def blind(tensors: Tensors) -> None:
        for name in [name for name in tensors if "visual" in name]:
            del tensors[name]

    model = load_model(make(tmp_path / "a", change=blind, layout=layout))
    assert model.config.vision is None and "vision" not in model


def test_memory_is_the_models(tmp_path: Path) -> None:
    """A bfloat16 file into float32: the peak is the model, and two tensors on their way."""
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "num_experts": 16}
    folder = make(tmp_path / "a", "moe", dtype="bfloat16", sizes=sizes)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    model = load_model(folder)
    values = [value.nbytes for _, value in tree_flatten(model.parameters())]
    assert mx.get_peak_memory() - before <= sum(values) + 2 * max(values)


# What is changed in the HF tensors, and what the error must say.
STRICT: dict[str, tuple[Callable[[Tensors], Any], list[str]]] = {
    "missing": (
        lambda t: t.pop("model.language_model.layers.1.linear_attn.dt_bias"),
        ["model.language_model.layers.1.linear_attn.dt_bias is in none of the files", "[6]"],
    ),
    "missing experts": (
        lambda t: t.pop("model.language_model.layers.1.mlp.experts.down_proj"),
        ["layers.1.mlp.experts.down_proj is in none", "[8, 64, 24]"],
    ),
    "missing head": (lambda t: t.pop("lm_head.weight"), ["lm_head.weight is in none", "tie_word_embeddings to true"]),
    "left over": (
        lambda t: t.update({"model.language_model.layers.0.self_attn.q_proj.bias": np.zeros(3, np.float32)}),
        ["self_attn.q_proj.bias in model.safetensors (F32 [3]) is left over", "no part of this model"],
    ),
    "a layer too many": (
        lambda t: t.update({"model.language_model.layers.4.input_layernorm.weight": np.zeros(64, np.float32)}),
        ["layers.4.input_layernorm.weight", "num_hidden_layers 4"],
    ),
    "shape": (
        lambda t: t.update({"model.language_model.norm.weight": np.zeros(63, np.float32)}),
        ["model.language_model.norm.weight in model.safetensors has shape [63], expected [64]"],
    ),
    "shape of the convolution": (
        lambda t: t.update(
            {"model.language_model.layers.0.linear_attn.conv1d.weight": np.zeros((104, 1, 3), np.float32)}
        ),
        ["conv1d.weight", "has shape [104, 1, 3], expected [104, 1, 4]"],
    ),
    "shape of fused experts": (
        lambda t: t.update(
            {"model.language_model.layers.0.mlp.experts.gate_up_proj": np.zeros((8, 64, 48), np.float32)}
        ),
        ["has shape [8, 64, 48], expected [8, 48, 64]"],
    ),
    "missing in the tower": (
        lambda t: t.pop("model.visual.blocks.1.norm2.bias"),
        ["model.visual.blocks.1.norm2.bias is in none of the files", "[24]"],
    ),
    "shape of the patch embedding": (
        lambda t: t.update({"model.visual.patch_embed.proj.weight": np.zeros((24, 96), np.float32)}),
        ["patch_embed.proj.weight", "has shape [24, 96], expected [24, 3, 2, 4, 4]"],
    ),
    "a block too many": (
        lambda t: t.update({"model.visual.blocks.2.norm2.bias": np.zeros(24, np.float32)}),
        ["model.visual.blocks.2.norm2.bias", "left over", "depth 2"],
    ),
    "unknown vision tensor": (
        lambda t: t.update({"model.visual.deepstack.0.weight": np.zeros(3, np.float32)}),
        ["model.visual.deepstack.0.weight", "left over"],
    ),
    "FP8 scales": (
        lambda t: t.update({"model.language_model.layers.0.mlp.gate.weight_scale_inv": np.zeros(3, np.float32)}),
        ["a quantization (FP8) that config.json does not describe", "take the unquantized checkpoint"],
    ),
}


@pytest.mark.parametrize("case", STRICT)
def test_strict(tmp_path: Path, case: str) -> None:
    change, messages = STRICT[case]
    with pytest.raises(CheckpointError) as caught:
        load_model(make(tmp_path / "a", "moe", change=change))
    for message in [str(tmp_path), "layout: Hugging Face", "Download the checkpoint again", *messages]:
        assert message in str(caught.value)


def test_missing_expert(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "moe", layout="hf-per-expert")
    rewrite(folder, lambda t: t.pop("model.language_model.layers.2.mlp.experts.7.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"layers.2.mlp.experts.7.up_proj.weight is in none.*\[24, 64\]"):
        load_model(folder)


def test_expert_of_another_shape(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["model.language_model.layers.2.mlp.experts.5.up_proj.weight"] = np.zeros((24, 63), np.float32)

    folder = make(tmp_path / "a", "moe", layout="hf-per-expert")
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=r"experts.5.up_proj.weight .*\[24, 63\], its neighbours have \[24, 64\]"):
        load_model(folder)


def rewrite(folder: Path, change: Callable[[Tensors], Any], marker: str | None = "pt") -> None:
    """Edit the tensors of a float32 single-file checkpoint under their published names, and its marker."""
    entries, _ = files.read_header(folder / "model.safetensors")
    tensors = {name: files.read(entry) for name, entry in entries.items()}
    change(tensors)
    metadata = {"format": marker} if marker else {}
    write_safetensors(folder / "model.safetensors", tensors, dict.fromkeys(tensors, "float32"), metadata)


def test_count_of_experts_in_config(tmp_path: Path) -> None:
    for number in (7, 9, 1_000_000):
        folder = make(tmp_path / str(number), "moe", layout="hf-per-expert")
        edit_config(folder, lambda c, n=number: c["text_config"].update(num_experts=n))
        with pytest.raises(CheckpointError, match="do not belong together"):
            load_model(folder)


def edit_config(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("marker", [None, "pt", "mlx"])
def test_the_convolutions_say_who_wrote_the_values(tmp_path: Path, layout: str, marker: str | None) -> None:
    """Whatever marker and names say, where the norms' values confirm it: a norm is shifted once, or not at all."""
    meant = weights(load_model(make(tmp_path / "a", layout=layout)))
    rewrite(tmp_path / "a", lambda t: None, marker=marker)
    found = weights(load_model(tmp_path / "a"))
    assert found.keys() == meant.keys() and all(np.array_equal(found[name], meant[name]) for name in meant)


def shift(by: float) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in tensors:
            if name.endswith(("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")):
                tensors[name] = tensors[name] + np.float32(by)

    return change


@pytest.mark.parametrize("marker", [None, "pt", "mlx"])
@pytest.mark.parametrize("layout, by", [("hf", 1), ("mlx", -1), ("mlx-text", -1), ("hf-per-expert", 1)])
def test_norms_that_contradict_the_convolutions_are_refused(
    tmp_path: Path, layout: str, by: float, marker: str | None
) -> None:
    rewrite(make(tmp_path / "a", layout=layout), shift(by), marker=marker)
    with pytest.raises(CheckpointError, match="unclear whether the norms are shifted.*but their values are"):
        load_model(tmp_path / "a")


@pytest.mark.parametrize("layout, marker", [("hf", "mlx"), ("mlx", "pt"), ("mlx-text", "pt")])
def test_norms_that_say_nothing_do_not_confirm(tmp_path: Path, layout: str, marker: str) -> None:
    rewrite(make(tmp_path / "a", layout=layout), lambda t: [v.fill(0) for n, v in t.items() if "norm" in n], marker)
    with pytest.raises(CheckpointError, match="unclear whether the norms are shifted.*but the files' metadata speaks"):
        load_model(tmp_path / "a")


def test_two_orders_of_convolutions_are_refused(tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        name = "model.language_model.layers.1.linear_attn.conv1d.weight"
        tensors[name] = tensors[name].transpose(0, 2, 1).copy()

    with pytest.raises(CheckpointError, match=r"mixes two layouts: convolutions are \[104, 1, 4\].*\[104, 4, 1\]"):
        load_model(make(tmp_path / "a", change=change))


def test_a_tower_in_either_order(tmp_path: Path) -> None:
    """A patch embedding is what its own shape says: some writers leave it alone and turn the rest."""
    meant = weights(load_model(make(tmp_path / "a", layout="mlx")))
    name = "vision_tower.patch_embed.proj.weight"
    rewrite(tmp_path / "a", lambda t: t.update({name: t[name].transpose(0, 4, 1, 2, 3).copy()}), "mlx")
    found = weights(load_model(tmp_path / "a"))
    assert all(np.array_equal(found[name], meant[name]) for name in meant)


def test_two_checkpoints_in_one_folder_are_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    shutil.copy(make(tmp_path / "b", layout="mlx") / "model.safetensors", folder / "model-mlx.safetensors")
    with pytest.raises(CheckpointError, match="some files are marked 'mlx' and some 'pt'"):
        load_model(folder)


@pytest.mark.parametrize("layout, head", [("hf", "lm_head.weight"), ("mlx", "language_model.lm_head.weight")])
def test_head_beside_tied_embeddings(tmp_path: Path, layout: str, head: str) -> None:
    folder = make(tmp_path / "a", layout=layout)
    plain = weights(load_model(folder))
    marker = "mlx" if layout == "mlx" else "pt"
    embeddings = "language_model.model.embed_tokens.weight" if layout == "mlx" else head_of(layout)
    rewrite(folder, lambda t: t.update({head: t[embeddings].copy()}), marker)
    again = weights(load_model(folder))
    assert again.keys() == plain.keys() and all(np.array_equal(again[n], plain[n]) for n in plain)
    rewrite(folder, lambda t: t[head].__setitem__((-1, -1), 7.0), marker)
    with pytest.raises(CheckpointError, match="ties the head.*tie_word_embeddings to false"):
        load_model(folder)
    edit_config(folder, lambda c: (c.update(tie_word_embeddings=False), c["text_config"].pop("tie_word_embeddings")))
    assert weights(load_model(folder))["lm_head.weight"][-1, -1] == 7


def head_of(layout: str) -> str:
    return {"hf": "model.language_model.embed_tokens.weight"}[layout]


@pytest.mark.parametrize("method", ["hqq", "quark", "torchao"])
def test_quantizations_of_other_tools_are_refused_by_name(tmp_path: Path, method: str) -> None:
    folder = make(tmp_path / "a")
    edit_config(folder, lambda c: c.update(quantization_config={"quant_method": method, "bits": 4}))
    with pytest.raises(CheckpointError, match=f"{method}.*not supported yet.*take the unquantized checkpoint"):
        load_model(folder)


def test_fp8_weights_that_config_does_not_speak_of_are_refused_by_name(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    path = folder / "model.safetensors"
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    target = header["model.language_model.embed_tokens.weight"]
    target["dtype"], target["shape"] = "F8_E4M3", [96, 256]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])
    with pytest.raises(CheckpointError, match="embed_tokens.weight in .* has dtype F8_E4M3.*FP8 is read in linear"):
        load_model(folder)


@pytest.mark.skipif(mx.default_device().type != mx.cpu, reason="a GPU multiplies experts in every dtype")
def test_experts_in_half_precision_are_refused_on_the_cpu(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", "moe", sizes={"moe_intermediate_size": 32})
    with pytest.raises(CheckpointError, match="a has unquantized experts.*leave dtype out"):
        load_model(folder, dtype="bfloat16")
    load_model(convert(folder, tmp_path / "b", group_size=32), dtype="bfloat16")


def test_context_length(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    assert load_model(folder).config.text.max_position_embeddings == 4096
    assert load_model(folder, context_length=100).config.text.max_position_embeddings == 100
    with pytest.raises(CheckpointError, match="allows 4,096 tokens.*reaches 16,384 .*--yarn.*short prompts"):
        load_model(folder, context_length=4097)
    with pytest.raises(CheckpointError, match="up to 16,384 with YaRN, not 16,385"):
        load_model(folder, context_length=16_385, yarn=True)
    with pytest.raises(ValueError, match="give it"):
        load_model(folder, yarn=True)
    for length, factor in ((4096, None), (4097, 2), (8192, 2), (8193, 3), (16_384, 4)):
        text = load_model(folder, context_length=length, yarn=True).config.text
        assert text.max_position_embeddings == length
        assert text.rope.yarn == (factor and Yarn(factor, 4096))
    with pytest.raises(ValueError, match="context_length is 0"):
        load_model(folder, context_length=0)


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="config.json does not exist"):
        load_model(tmp_path)
