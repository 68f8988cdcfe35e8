"""Sources in other forms: what they mean, exactly, is what the GGUF file holds."""

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize

from mlx_qwen35.conversion.convert import convert
from tests.checkpoint.foreign import write_fp8, write_gptq
from tests.checkpoint.test_fp8 import fused
from tests.conversion.gguf.expected import text_tensors, write_companions
from tests.conversion.gguf.test_values import config_of, source_of

SIZES = {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "vocab_size": 270}


def values_of(path: Path) -> dict[str, np.ndarray]:
    found = ((tensor.name, dequantize(tensor.data, tensor.tensor_type)) for tensor in GGUFReader(path).tensors)
    return {name: np.asarray(value, np.float32) for name, value in found}


@pytest.mark.parametrize("form", ["fp8", "gptq"])
def test_other_tools(tmp_path: Path, form: str) -> None:
    source = tmp_path / "a"
    meant = write_fp8(source, **SIZES) if form == "fp8" else write_gptq(source, sizes=SIZES)
    write_companions(source, 270)
    found = values_of(convert(source, tmp_path / "b.gguf", outtype="f32"))
    expected = text_tensors(fused(meant), json.loads((source / "config.json").read_text()))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.array_equal(found[name], value), name


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
def test_packed_by_mlx(tmp_path: Path, mode: str) -> None:
    """As the same checkpoint unpacked to float32; and experts in mxfp4 keep their values in MXFP4."""
    source_of(tmp_path / "a", config_of("moe"))
    packed = convert(tmp_path / "a", tmp_path / "b", mode=mode, group_size=32 if mode == "affine" else 64)
    unpacked = convert(packed, tmp_path / "c", bits=None, dtype="float32")
    files = (convert(path, tmp_path / f"{path.name}.gguf", outtype="f32") for path in (packed, unpacked))
    found, meant = map(values_of, files)
    assert found.keys() == meant.keys()
    assert all(np.array_equal(found[name], meant[name]) for name in meant)
    if mode == "mxfp4":
        small = values_of(convert(packed, tmp_path / "s.gguf", outtype="mxfp4"))
        experts = [name for name in small if "_exps." in name and not name.startswith("blk.4.")]
        assert len(experts) == 12
        assert all(np.array_equal(small[name], meant[name]) for name in experts)
