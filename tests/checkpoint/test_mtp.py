"""The MTP head from every form it is published in: the same weights, strictly checked."""

import json
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_qwen35 import convert, load_draft_model, load_model
from mlx_qwen35.checkpoint.mtp import is_drafter, load_mtp
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.drafting import drafting_bytes
from mlx_qwen35.model.mtp import MTPHead
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.checkpoints import loaded, random_tensors, relayout, tiny_config, write_checkpoint
from tests.conversion.test_convert_mlx import AFFINE, write_mtp

QUANTIZABLE = {"hidden_size": 64, "head_dim": 32, "num_attention_heads": 6, "moe_intermediate_size": 64,
               "shared_expert_intermediate_size": 128, "rope_parameters": {"mrope_section": [3, 3, 2]}}  # fmt: skip


def expected(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Published MTP tensors, experts fused or one by one, as the head has them."""
    mine = {name.replace("mtp.", "model.", 1): value for name, value in tensors.items() if name.startswith("mtp.")}
    experts: dict[str, list[np.ndarray]] = {}
    for name in sorted((n for n in mine if n.split(".experts.")[-1][:1].isdigit()), key=_expert):
        stem, _, rest = name.partition(".experts.")
        experts.setdefault(f"{stem}.switch_mlp.{rest.partition('.')[2]}", []).append(mine.pop(name))
    mine |= {name: np.stack(each) for name, each in experts.items()}
    return dict(loaded(*pair) for pair in relayout(mine, "mlx").items())


def _expert(name: str) -> int:
    return int(name.split(".experts.")[1].split(".")[0])


def assert_holds(head: MTPHead, tensors: dict[str, np.ndarray], atol: float = 0.0) -> None:
    found, wanted = dict(tree_flatten(head.parameters())), expected(tensors)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(np.array(found[name]), value, atol=atol, err_msg=name)


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_from_the_shards(tmp_path: Path, kind: str, layout: str) -> None:
    config = tiny_config(kind, mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors, shards=3, layout=layout)
    head = load_mtp(tmp_path, ModelConfig.from_folder(tmp_path))
    assert_holds(head, tensors)
    assert not head.training


def test_experts_fused_in_the_model_and_apart_in_the_head(tmp_path: Path) -> None:
    """As the largest model is published."""
    config = tiny_config("moe", mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    head = {name: value for name, value in tensors.items() if name.startswith("mtp.")}
    main = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    write_checkpoint(tmp_path, config, main | relayout(head, "hf-per-expert"))
    assert_holds(load_mtp(tmp_path, load_model(tmp_path).config), tensors)


@pytest.mark.parametrize("write", [write_fp8, write_gptq])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_from_fp8_and_gptq(tmp_path: Path, kind: str, write: Callable) -> None:
    meant = write(tmp_path / "a", kind)
    assert_holds(load_mtp(tmp_path / "a", ModelConfig.from_folder(tmp_path / "a")), meant, atol=1e-6)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_from_a_conversion(tmp_path: Path, kind: str) -> None:
    config = tiny_config(kind, mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    write_checkpoint(tmp_path / "a", config, tensors)
    out = convert(tmp_path / "a", tmp_path / "b", bits=None, dtype="float32")
    assert (out / "mtp/weights.safetensors").exists()
    assert_holds(load_mtp(out, ModelConfig.from_folder(out)), tensors)


@pytest.mark.parametrize("beside", [False, True], ids=["in shards", "in mtp"])
@pytest.mark.parametrize("spec", [AFFINE, {"group_size": 16, "bits": 4, "mode": "nvfp4"}], ids=str)
def test_quantized(tmp_path: Path, spec: dict, beside: bool) -> None:
    meant = write_mtp(tmp_path / "a", spec, beside)
    check_quantized(load_mtp(tmp_path / "a", ModelConfig.from_folder(tmp_path / "a")), meant)


def check_quantized(head: MTPHead, meant: dict[str, mx.array]) -> None:
    """Its quantized modules stand for what is meant."""
    modules = dict(head.named_modules())
    count = 0
    for name, value in meant.items():
        if not name.startswith("mtp."):
            continue
        path = name.removeprefix("mtp.").removesuffix(".weight").replace("switch_mlp", "experts")
        module = modules[path]
        found = module.weight
        if hasattr(module, "scales"):
            how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
            found = mx.dequantize(module.weight, module.scales, module.get("biases"), **how)
            count += 1
        np.testing.assert_allclose(np.array(found.astype(mx.float32)), np.array(value.astype(mx.float32)), atol=1e-6)
    assert count > 8


def write_drafter(folder: Path, kind: str, spec: dict | None = None) -> tuple[dict, dict[str, np.ndarray]]:
    """A drafter's folder as mlx-vlm splits one off; returns config.json of its model, and what is meant."""
    config = tiny_config(kind, mtp_num_hidden_layers=1, **QUANTIZABLE if kind == "moe" else {})
    tensors = random_tensors(config)
    head = {name.replace("mtp.", "model.", 1): value for name, value in tensors.items() if name.startswith("mtp.")}
    arrays, meant = {}, {}
    for name, value in relayout(head, "mlx").items():
        name, array = name.removeprefix("language_model.model."), mx.array(value)
        path = name.removesuffix(".weight")
        if spec and array.ndim > 1 and not name.endswith("mlp.gate.weight"):
            parts = mx.quantize(array, **spec)
            arrays |= dict(zip((name, f"{path}.scales", f"{path}.biases"), parts, strict=False))
            array = mx.dequantize(*parts, **spec)
        else:
            arrays[name] = array
        meant[f"mtp.{name}"] = array
    raw = {"model_type": "qwen3_5_mtp", "text_config": config["text_config"], "block_size": 3,
           "tie_word_embeddings": config["tie_word_embeddings"]}  # fmt: skip
    if spec:
        raw |= {"quantization": spec, "quantization_config": spec}
    folder.mkdir()
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, metadata={"format": "mlx"})
    (folder / "config.json").write_text(json.dumps(raw))
    return config, meant if spec else tensors


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_from_a_drafter(tmp_path: Path, kind: str) -> None:
    config, tensors = write_drafter(tmp_path / "d", kind)
    assert is_drafter(tmp_path / "d") and not is_drafter(tmp_path)
    assert_holds(load_mtp(tmp_path / "d", ModelConfig.from_dict(config)), tensors)


def test_from_a_quantized_drafter(tmp_path: Path) -> None:
    config, meant = write_drafter(tmp_path / "d", "moe", {"group_size": 32, "bits": 4, "mode": "affine"})
    check_quantized(load_mtp(tmp_path / "d", ModelConfig.from_dict(config)), meant)


def test_load_draft_model_knows_both(tmp_path: Path) -> None:
    config, _ = write_drafter(tmp_path / "d", "dense")
    write_checkpoint(tmp_path / "m", config, random_tensors(config))
    other = tiny_config("moe", vocab_size=97)
    write_checkpoint(tmp_path / "n", other, random_tensors(other))
    model = load_model(tmp_path / "m")
    assert isinstance(load_draft_model(tmp_path / "d", model), MTPHead)
    assert load_draft_model(tmp_path / "m", model).config.text == model.config.text
    with pytest.raises(CheckpointError, match="has 97 tokens, the model it is to draft for 96"):
        load_draft_model(tmp_path / "n", model)


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    config = tiny_config("dense", mtp_num_hidden_layers=1)
    tensors = random_tensors(config)
    without = {name: value for name, value in tensors.items() if not name.startswith("mtp.")}
    write_checkpoint(tmp_path / "none", config, without)
    with pytest.raises(CheckpointError, match="has no MTP layer.*load it without one"):
        load_mtp(tmp_path / "none", ModelConfig.from_dict(config))
    lacking = {name: value for name, value in tensors.items() if name != "mtp.fc.weight"}
    write_checkpoint(tmp_path / "lacking", config, lacking)
    with pytest.raises(CheckpointError, match="mtp.fc.weight is missing"):
        load_mtp(tmp_path / "lacking", ModelConfig.from_dict(config))
    write_checkpoint(tmp_path / "whole", config, tensors)
    other = ModelConfig.from_dict(tiny_config("dense", mtp_num_hidden_layers=1, hidden_size=128))
    with pytest.raises(CheckpointError, match="does not belong to this model:\n.*mtp.fc.weight .*is F32"):
        load_mtp(tmp_path / "whole", other)
    more = tensors | {"mtp.layers.0.mlp.gate.weight": np.zeros((2, 64), np.float32)}
    write_checkpoint(tmp_path / "more", config, more)
    with pytest.raises(CheckpointError, match="mtp.layers.0.mlp.gate.weight in .* is left over"):
        load_mtp(tmp_path / "more", ModelConfig.from_dict(config))


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_its_bytes_are_known_before_a_weight_is_read(tmp_path: Path, kind: str) -> None:
    config = tiny_config(kind, mtp_num_hidden_layers=1)
    write_checkpoint(tmp_path, config, random_tensors(config))
    head = load_mtp(tmp_path, ModelConfig.from_folder(tmp_path))
    weights = sum(array.nbytes for _, array in tree_flatten(head.parameters()))
    beside = drafting_bytes(tmp_path, True, None)
    per_token = 2 * 3 * 16 * 4  # keys and values of 3 heads of 16
    assert weights + 4096 * per_token <= beside(4096) and beside(4096) - beside(256) >= 3840 * per_token
    assert drafting_bytes(tmp_path, False, None) is None
    model = sum(array.nbytes for _, array in tree_flatten(load_model(tmp_path).parameters()))
    assert drafting_bytes(tmp_path, False, tmp_path)(256) > model
