"""Every value and type of a GGUF file that convert() writes, as gguf-py reads it, against llama.cpp's rules."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import QuantError, dequantize, quantize

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conversion.gguf.expected import text_tensors, tower_tensors, write_companions
from tests.tiny_model import run, some_tokens

# All sizes differ; heads so that their permutation is not its own inverse, and rows that blocks divide and do not.
SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "vocab_size": 270, "mtp_num_hidden_layers": 1}
DENSE = {**SIZES, "intermediate_size": 160}
MOE = {**SIZES, "moe_intermediate_size": 96, "shared_expert_intermediate_size": 40}
OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "mxfp4")


def config_of(kind: str, **changes: Any) -> dict[str, Any]:
    return tiny_config(kind, vision=True, **((DENSE if kind == "dense" else MOE) | changes))


def source_of(folder: Path, config: dict[str, Any], dtype: str = "float32", **how: Any) -> dict[str, np.ndarray]:
    """Writes a checkpoint; -> its tensors, as a float32 model has them."""
    tensors = random_tensors(config, 3)
    if dtype == "bfloat16":
        kept = ("linear_attn.A_log", "linear_attn.norm.weight")
        tensors = {n: v if n.endswith(kept) else (v.view(np.uint32) & 0xFFFF0000).view(np.float32)
                   for n, v in tensors.items()}  # fmt: skip
    write_checkpoint(folder, config, tensors, dtype=dtype, **how)
    write_companions(folder, 270)
    return tensors


def tensors_of(path: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in GGUFReader(path).tensors}


def kind_of(name: str, value: np.ndarray, outtype: str, tied: bool) -> str:
    """As llama.cpp's converter gives types; four bits as docs/CHECKPOINTS.md says."""
    plain = ("norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d.weight", "ssm_a")
    if value.ndim == 1 or name.endswith((*plain, "position_embd.weight")):
        return "F32"
    if "patch_embd" in name:
        return "F16" if outtype == "F16" else "F32"
    fine = name.endswith(("output.weight", "ssm_alpha.weight", "ssm_beta.weight")) or (tied and "token_embd" in name)
    if (outtype in ("Q4_0", "Q4_1") and fine) or (outtype == "MXFP4" and "_exps." not in name):
        outtype = "Q8_0"
    return outtype if value.shape[-1] % 32 == 0 or outtype in ("F32", "F16", "BF16") else "F16"


def check_file(path: Path, meant: dict[str, np.ndarray], outtype: str, tied: bool = False) -> None:
    found = tensors_of(path)
    assert found.keys() == meant.keys()
    for name, value in meant.items():
        kind = kind_of(name, value, outtype, tied)
        assert found[name].tensor_type.name == kind, name
        assert tuple(found[name].shape)[::-1] == value.shape, name
        bits = quantize(np.ascontiguousarray(value), GGMLQuantizationType[kind])
        assert found[name].data.tobytes() == bits.tobytes(), name


@pytest.mark.parametrize(("kind", "outtype"), [*(("moe", outtype) for outtype in OUTTYPES), ("dense", "q4_0")])
def test_tensors(tmp_path: Path, kind: str, outtype: str) -> None:
    config = config_of(kind)
    meant = source_of(tmp_path / "a", config, "bfloat16", shards=2)
    out = convert(tmp_path / "a", tmp_path / "out.gguf", outtype=outtype)
    check_file(out, text_tensors(meant, config), outtype.upper(), tied=kind == "dense")
    tower = outtype.upper() if outtype in ("f32", "bf16") else "F16"
    check_file(tmp_path / "out-mmproj.gguf", tower_tensors(meant), tower)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "out-mmproj.gguf", "out.gguf"]


@pytest.mark.parametrize("changes", [
    {"linear_num_key_heads": 3, "linear_num_value_heads": 3},  # nothing to permute
    {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "layer_types": ["full_attention", "linear_attention"]},
    {"mtp_num_hidden_layers": 0, "tie_word_embeddings": False},
], ids=["one-value-head-a-key", "two", "no-mtp"])  # fmt: skip
def test_other_geometry(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = config_of("dense", **changes)
    config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"]
    meant = source_of(tmp_path / "a", config)
    out = convert(tmp_path / "a", tmp_path / "out.gguf", outtype="f32")
    check_file(out, text_tensors(meant, config), "F32")


@pytest.mark.parametrize("layout", ["hf-per-expert", "mlx"])
def test_other_layouts(tmp_path: Path, layout: str) -> None:
    config = config_of("moe", mtp_num_hidden_layers=0)
    meant = source_of(tmp_path / "a", config, layout=layout)
    out = convert(tmp_path / "a", tmp_path / "out.gguf", outtype="q4_1")
    check_file(out, text_tensors(meant, config), "Q4_1")
    check_file(tmp_path / "out-mmproj.gguf", tower_tensors(meant), "F16")


def test_pieces_do_not_change_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_qwen35.conversion import task
    from mlx_qwen35.conversion.gguf import tensors

    config = config_of("moe")
    source_of(tmp_path / "a", config, "bfloat16")
    whole = convert(tmp_path / "a", tmp_path / "whole.gguf", outtype="q8_0").read_bytes()
    monkeypatch.setattr(task, "PIECE_BYTES", 1000)
    monkeypatch.setattr(tensors, "_AT_ONCE", 150)
    assert convert(tmp_path / "a", tmp_path / "whole2-q8_0.gguf").read_bytes()[-5000:] == whole[-5000:]
    again = convert(tmp_path / "a", tmp_path / "whole.gguf", outtype="q8_0", overwrite=True)
    assert again.read_bytes() == whole


def test_gguf_py_refuses_what_we_give_float16() -> None:
    with pytest.raises(QuantError):
        quantize(np.ones((2, 40), np.float32), GGMLQuantizationType.Q8_0)


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_our_own_reader_gets_the_model_back(tmp_path: Path, kind: str) -> None:
    """Logits of the file are those of the source; there and back again, it is the same file."""
    config = config_of(kind)
    source_of(tmp_path / "a", config, "bfloat16")
    out = convert(tmp_path / "a", tmp_path / "out.gguf")
    tokens = some_tokens(37)
    meant, found = (run(load_model(path), tokens) for path in (tmp_path / "a", out))
    assert np.abs(found - meant).max() <= 1e-4 * np.abs(meant).max()
    convert(out, tmp_path / "b" / "out.gguf")
    for name in ("out.gguf", "out-mmproj.gguf"):
        one, two = tensors_of(tmp_path / name), tensors_of(tmp_path / "b" / name)
        odd = [key for key in one if two[key].data.tobytes() != one[key].data.tobytes()]
        assert all(key.endswith("ssm_a") for key in odd)  # exp of a logarithm
        assert one.keys() == two.keys()


@pytest.mark.parametrize(("outtype", "size", "lost"), [
    ("q8_0", 1e-4, False), ("q8_0", 3e-5, True), ("q8_0", 1e-6, True), ("q4_0", 3e-5, False), ("q4_0", 1e-6, True),
    ("q4_1", 1e-6, True), ("f16", 1e-6, False), ("f16", 1e-7, True), ("bf16", 1e-9, False), ("q8_0", 0.0, False),
])  # fmt: skip
def test_weights_that_are_too_small_are_told(tmp_path: Path, outtype: str, size: float, lost: bool) -> None:
    """Blocks of which float16 scales lose a sixteenth or more; what is zero is not lost."""
    config = config_of("moe", vision_config=None)
    tensors = random_tensors(config, 3)
    experts = next(value for name, value in tensors.items() if name.endswith("experts.down_proj"))
    blocks = experts[0].reshape(-1, 32)
    blocks *= size / np.abs(blocks).max(axis=-1, keepdims=True)
    write_checkpoint(tmp_path / "a", config, tensors)
    write_companions(tmp_path / "a", 270)
    notes: list[str] = []
    out = convert(tmp_path / "a", tmp_path / "out.gguf", outtype=outtype, on_note=notes.append)
    assert len(notes) == lost
    if lost:
        share = 1 / config["text_config"]["num_experts"]
        assert f"in 1 tensors, at most {share:.2%} of its groups (blk.0.ffn_down_exps.weight)" in notes[0]
    found = tensors_of(out)["blk.0.ffn_down_exps.weight"]
    values = np.array(dequantize(found.data, found.tensor_type)).reshape(experts.shape)[0].reshape(-1, 32)
    off = np.abs(values - blocks).max(axis=-1) / np.maximum(np.abs(blocks).max(axis=-1), 1e-30)
    if not lost:
        assert (off < (0.2 if outtype.startswith("q4") else 0.07)).all()
    elif size < 2e-6 and outtype != "q4_0":
        assert (off > 0.2).any()
