"""AutoRound's integers under its own name, as Intel and others publish them; and what of its forms is refused."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import load_mtp
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.survey import survey
from tests.checkpoint.foreign import write_gptq
from tests.checkpoint.test_forms import guesses
from tests.checkpoint.test_gptq import same_values
from tests.checkpoint.test_mtp import expected
from tests.checkpoints import write_checkpoint

OWN = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "data_type": "int",
       "autoround_version": "0.16.1", "block_name_to_quantize": "model.language_model.layers", "iters": 200,
       "desc_act": None, "dynamic": None}  # fmt: skip
kinds = pytest.mark.parametrize("kind", ["dense", "moe"])


def published(folder: Path, kind: str = "moe", **changes: Any) -> dict[str, np.ndarray]:
    return write_gptq(folder, kind, **({"order": False} | OWN | changes))


@kinds
@pytest.mark.parametrize(
    "changes",
    [{}, {"bits": 8}, {"bits": 2}, {"quant_method": "auto_round"}, {"packing_format": "auto_gptq"}, {"order": True},
     {"block_name_to_quantize": ["model.language_model.layers"]}, {"tag": "BF16"}],
    ids=str,
)  # fmt: skip
def test_read_as_gptq(tmp_path: Path, kind: str, changes: dict[str, Any]) -> None:
    same_values(tmp_path / "a", published(tmp_path / "a", kind, **changes))
    assert survey(tmp_path / "a").quantization.startswith("auto")


@kinds
@pytest.mark.parametrize("rule", ["paths", "patterns"])
def test_single_modules_have_other_bits(tmp_path: Path, kind: str, rule: str) -> None:
    """extra_config names them by path, or by a regular expression; 16 bits are a module left alone."""
    stem = "mlp.experts.{}.down_proj" if kind == "moe" else "mlp.down_proj"
    paths = [f"model.language_model.layers.{n}.{stem.format(e)}" for n in range(2) for e in range(4)]
    extra: dict[str, Any] = dict.fromkeys(paths, {"bits": 8, "group_size": 32, "sym": True, "data_type": "int"})
    if rule == "patterns":
        extra = {r".*layers\.\d+\.mlp\..*down_proj": {"bits": 8}}
    extra |= {"lm_head": {"bits": 16, "data_type": "float"}, ".*shared_expert.*": {"bits": 16},
              "model.language_model.layers.0.linear_attn.norm": {"bits": 16, "data_type": "float"}}  # fmt: skip
    meant = published(tmp_path / "a", kind, special={"down_proj": 8}, extra_config=extra)
    same_values(tmp_path / "a", meant)
    found = {spec.bits for module, spec in open_source(tmp_path / "a").specs.items() if module.endswith("down_proj")}
    assert found == {8}


@pytest.mark.parametrize("bits", [4, None])
def test_conversion(tmp_path: Path, bits: int | None) -> None:
    meant = published(tmp_path / "a", special={"down_proj": 8}, extra_config={".*down_proj": {"bits": 8}}, head=True)
    out = convert(tmp_path / "a", tmp_path / "b", bits=bits, group_size=32, dtype="float32", verify=True)
    tokens = mx.array([[5, 9, 77, 33]])
    difference = load_model(out, dtype="float32")(tokens) - load_model(tmp_path / "a", dtype="float32")(tokens)
    assert mx.abs(difference).max().item() < (1 if bits else 1e-3)
    assert_head(out, meant)


@kinds
def test_a_head_of_integers(tmp_path: Path, kind: str) -> None:
    meant = published(tmp_path / "a", kind, head=True)
    assert_head(tmp_path / "a", meant)


def assert_head(folder: Path, meant: dict[str, np.ndarray]) -> None:
    config = load_model(folder).config
    head = load_mtp(folder, config, dtype="float32")
    plain = {name: value for name, value in meant.items() if name.startswith("mtp.")}
    raw = {k: v for k, v in config.raw.items() if not k.startswith("quantization")}
    other = write_checkpoint(folder.parent / f"plain-{folder.name}", raw, meant)
    assert mx.abs(guesses(folder, config) - guesses(other, config)).max().item() < 2e-3
    assert expected(plain).keys() and head.norm.weight.shape == (160,)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"sym": "no"}, "sym is 'no' where true or false"),
        ({"packing_format": "auto_round:llm_compressor"}, "packing_format is 'auto_round:llm_compressor'"),
        ({"data_type": "mx_fp"}, "data_type is 'mx_fp', and only integers"),
        ({"data_type": "nv_fp"}, "data_type is 'nv_fp', and only integers"),
        ({"act_bits": 4}, "act_bits is 4, and quantized activations are not computed"),
        ({"bits": 5, "special": {"proj": 4}}, "bits is 5, and AutoRound is read with 2, 3, 4, 8 bits only"),
        ({"extra_config": {"a.b": {"bits": 5}}}, "extra_config.a.b.bits is 5"),
        ({"extra_config": {"a.b": {"sym": 0}}}, "extra_config.a.b.sym is 0"),
        ({"extra_config": {"a.b": {"data_type": "mx_fp4"}}}, "extra_config.a.b has data_type 'mx_fp4'"),
        ({"extra_config": ["a"]}, "extra_config is no object"),
        ({"extra_config": {"(a+)+": {"bits": 8}}}, "is a pattern of a kind that is not read"),
        ({"extra_config": {".*a" * 9: {"bits": 8}}}, "is a pattern of a kind that is not read"),
        ({"packing_format": ["a"]}, "packing_format is"),
    ],
    ids=str,
)
def test_other_forms_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    published(tmp_path / "a", **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(tmp_path / "a")
    assert "take the unquantized checkpoint" in str(caught.value)


def test_files_that_contradict_config(tmp_path: Path) -> None:
    published(tmp_path / "a", extra_config={".*up_proj": {"bits": 8}})
    with pytest.raises(CheckpointError, match=r"up_proj.qweight .* has shape \[20, 96\], expected \[40, 96\] by"):
        load_model(tmp_path / "a")
    published(tmp_path / "b", extra_config={".*up_proj": {"bits": 16}})
    with pytest.raises(CheckpointError, match="up_proj.qweight is there, but config.json says that the module is not"):
        load_model(tmp_path / "b")
    only = {"model.language_model.layers.0.mlp.experts.1.up_proj": {"bits": 8}}
    published(tmp_path / "c", extra_config=only)
    with pytest.raises(CheckpointError, match="experts have different quantizations by config.json"):
        load_model(tmp_path / "c")
