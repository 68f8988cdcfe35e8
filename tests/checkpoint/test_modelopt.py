"""What of ModelOpt's checkpoints is not read is refused by name, wherever that is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import Written, write_fp8
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

HF_QUANT = {"producer": {"name": "modelopt", "version": "0.47.0"},
            "quantization": {"quant_algo": "NVFP4", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}}


def write(folder: Path, section: dict[str, Any] | None, beside: dict[str, Any] | None) -> None:
    def packed(written: Written) -> None:
        """One module as NVFP4: two values a byte, a scale for 16, one for all."""
        name = "model.language_model.layers.0.mlp.up_proj.weight"
        height, width = 288, 160
        written[name] = "U8", np.zeros((height, width // 2), np.uint8)
        written.pop(f"{name}_scale_inv")
        written[f"{name}_scale"] = "F8_E4M3", np.zeros((height, width // 16), np.uint8)
        written[f"{name}_scale_2"] = "F32", np.ones((), np.float32)

    write_fp8(folder, "dense", change=packed, section=section or {})
    if section is None:
        config = json.loads((folder / "config.json").read_text())
        del config["quantization_config"]
        (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))


@pytest.mark.parametrize(
    "section, beside, names",
    [
        (None, {"quantization": {"quant_algo": "W4A8_AWQ"}}, ["hf_quant_config.json", "W4A8_AWQ"]),
        ({"quant_method": "fp8", "fmt": "e4m3", "moe_quant_algo": "NVFP4_AWQ", "weight_block_size": [128, 128]}, None,
         ["config.json", "NVFP4_AWQ"]),
        ({"quant_method": "modelopt", "quant_algo": "INT4_AWQ"}, HF_QUANT, ["config.json", "INT4_AWQ"]),
        ({"quant_method": "modelopt"}, None, ["config.json", "None"]),
    ],
    ids=["beside only", "fp8 with experts", "modelopt", "no word"],
)  # fmt: skip
def test_refused_by_name(tmp_path: Path, section: dict[str, Any], beside: dict[str, Any], names: list[str]) -> None:
    write(tmp_path / "a", section, beside)
    for use in (load_model, lambda folder: convert(folder, tmp_path / "b")):
        with pytest.raises(CheckpointError, match="quantized by NVIDIA ModelOpt") as caught:
            use(tmp_path / "a")
        assert all(name in str(caught.value) for name in names) and "belong together" not in str(caught.value)


def test_a_file_that_was_left_behind_is_no_matter(tmp_path: Path) -> None:
    """Dequantized again, with the note still there."""
    config = tiny_config("dense")
    write_checkpoint(tmp_path / "a", config, random_tensors(config))
    for text in (json.dumps(HF_QUANT), "[", "[]", "{}"):
        (tmp_path / "a/hf_quant_config.json").write_text(text)
        load_model(tmp_path / "a")
    out = convert(tmp_path / "a", tmp_path / "b", bits=None)
    assert not (out / "hf_quant_config.json").exists()  # other loaders would believe it
