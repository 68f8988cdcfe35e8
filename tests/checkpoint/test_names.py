"""Names there and back in every layout, and how a layout is found or refused."""

import numpy as np
import pytest

from mlx_qwen35.checkpoint.inventory import text_tensors
from mlx_qwen35.checkpoint.names import HF, MLX, TARGET, Layout, find_layout
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import relayout, tensor_shapes, tiny_config

FORMS = [("hf", "pt"), ("hf-per-expert", "pt"), ("mlx", "mlx"), ("mlx-text", "mlx")]


def published(kind: str, form: str, **sizes: object) -> list[str]:
    config = tiny_config(kind, vision=form != "mlx-text", mtp_num_hidden_layers=0, **sizes)
    zeros = {name: np.zeros(shape, np.float32) for name, shape in tensor_shapes(config).items()}
    return list(relayout(zeros, form))


@pytest.mark.parametrize("kind", ["dense", "moe"])
@pytest.mark.parametrize("form, marker", FORMS)
def test_every_name_there_and_back(kind: str, form: str, marker: str) -> None:
    names = published(kind, form)
    layout = find_layout(names, [marker], "here")
    assert layout.kind == (MLX if marker == "mlx" else HF)
    config = ModelConfig.from_dict(tiny_config(kind))
    wanted = set(text_tensors(config))
    reached = {source for ours in wanted for source in layout.source(ours, 8).names}
    text = {name for name in names if not layout.is_known(name)}
    assert reached == text
    assert {ours for name in text for ours in layout.ours(name)} == wanted


def test_vision_names() -> None:
    layout = find_layout(published("dense", "hf"), ["pt"], "here")
    seen = [name for name in published("dense", "hf") if name.startswith("model.visual.")]
    assert seen and all(layout.is_known(name) for name in seen)
    assert {TARGET.source(layout.ours(name)[0]).names[0] for name in seen} == {
        name for name in published("dense", "mlx") if name.startswith("vision_tower.")
    }
    assert not layout.is_known("model.visual.blocks.0.mlp.linear_fc3.weight")
    assert layout.ours("model.visual.nonsense") == ()


def test_mtp_names() -> None:
    layout = find_layout(published("moe", "hf"), ["pt"], "here")
    assert layout.is_known("mtp.fc.weight") and layout.is_known("mtp.layers.0.mlp.experts.gate_up_proj")
    assert layout.is_known("mtp.layers.0.mlp.experts.7.up_proj.weight")
    assert not layout.is_known("mtp.fc.scales") and not layout.is_known("mtp.layers.0.mlp.experts.up_proj")
    assert TARGET.is_known("mtp.fc.scales")


def test_fused_experts_are_halved() -> None:
    layout = find_layout(published("moe", "hf"), ["pt"], "here")
    gate = layout.source("layers.2.mlp.experts.gate_proj.weight")
    up = layout.source("layers.2.mlp.experts.up_proj.weight")
    assert gate.names == up.names == ("model.language_model.layers.2.mlp.experts.gate_up_proj",)
    assert (gate.half, up.half) == (0, 1)


def test_mtp_experts_may_differ_from_the_others() -> None:
    """The 397B fuses its experts and not those of its MTP layer."""
    names = published("moe", "hf") + [f"mtp.layers.0.mlp.experts.{e}.up_proj.weight" for e in range(3)]
    layout = find_layout(names, ["pt"], "here")
    assert layout.source("mtp.layers.0.mlp.experts.up_proj.weight", 3).names[2] == names[-1]
    assert layout.source("layers.0.mlp.experts.up_proj.weight", 3).half == 1


def test_norms_are_shifted_in_hf_only() -> None:
    shifted = [
        "norm.weight", "layers.3.input_layernorm.weight", "layers.3.post_attention_layernorm.weight",
        "layers.3.self_attn.q_norm.weight", "layers.3.self_attn.k_norm.weight", "mtp.norm.weight",
        "mtp.pre_fc_norm_hidden.weight", "mtp.layers.0.self_attn.k_norm.weight",
    ]  # fmt: skip
    plain = ["layers.0.linear_attn.norm.weight", "vision.merger.norm.weight", "vision.blocks.0.norm1.weight"]
    layout = find_layout(published("dense", "hf"), ["pt"], "here")
    assert all(map(layout.is_shifted, shifted)) and not any(map(layout.is_shifted, plain))
    assert not any(map(TARGET.is_shifted, shifted + plain))


def test_plain_names_are_decided_by_the_marker() -> None:
    names = [n for n in published("dense", "mlx-text") if "visual" not in n]
    assert find_layout(names, ["mlx"], "here").kind == MLX
    assert find_layout(names, ["pt"], "here").kind == HF
    assert find_layout(names, ["mlx", None], "here").kind == MLX
    assert find_layout(names, [None], "here").kind == HF  # and the convolution's shape has to agree


REFUSED = {
    "layouts": (["model.language_model.norm.weight", "language_model.model.norm.weight"], [None], "mixes two layouts"),
    "two roofs": (["model.language_model.norm.weight", "model.norm.weight"], ["pt"], "two ways of naming"),
    "experts": (
        ["model.layers.0.mlp.experts.down_proj", "model.layers.1.mlp.experts.0.down_proj.weight"],
        ["pt"],
        "two layouts of experts",
    ),
    "markers": (["model.norm.weight"], ["pt", "mlx"], "some files are marked"),
    "marker against names": (["language_model.model.norm.weight"], ["pt"], "unclear whether the norms are shifted"),
    "names against marker": (["model.language_model.norm.weight"], ["mlx"], "unclear whether the norms are shifted"),
    "unknown marker": (["model.language_model.norm.weight"], ["mlz"], "'mlz', which is none of"),
    "no witness": (["model.norm.weight"], [None], "neither metadata nor names"),
    "no text model": (["mtp.fc.weight"], ["pt"], "no tensor of a text model"),
    "nothing": ([], [], "no tensor of a text model"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    names, formats, message = REFUSED[case]
    with pytest.raises(CheckpointError, match=message) as caught:
        find_layout(names, formats, "here")
    assert "here" in str(caught.value)


def test_layout_says_what_it_is() -> None:
    assert TARGET.label == "MLX (language_model.model.*)"
    assert isinstance(TARGET, Layout)
