"""The MTP head wherever its writers put it, under each of their names, with its norms in either convention."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.mtp import load_mtp, open_head
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.library.survey import survey
from tests.checkpoint.forms import config_of, mtp_tensors, pack
from tests.checkpoint.test_forms import guesses
from tests.checkpoints import Tensors, random_tensors, relayout, write_checkpoint

PLACES = ["mtp/weights.safetensors", "optiq/mtp.safetensors", "mtp.safetensors", "mtp/model.safetensors",
          "model_extra_tensors.safetensors"]  # fmt: skip
FOUR = {"group_size": 32, "bits": 4}
kinds = pytest.mark.parametrize("kind", ["dense", "moe"])


def write_bundle(folder: Path, kind: str, **config: Any) -> tuple[Tensors, mx.array]:
    """An MLX checkpoint without its head, in shards with an index; returns all tensors, and what the head guesses."""
    raw = config_of(kind)
    tensors = random_tensors(raw, 8)
    meant = write_checkpoint(folder.parent / "plain", raw, tensors)
    write_checkpoint(folder, raw | config, tensors, layout="mlx", shards=2)
    return tensors, guesses(meant, ModelConfig.from_folder(meant))


def put(folder: Path, place: str, arrays: dict[str, Any], marker: str | None = "mlx") -> None:
    (folder / place).parent.mkdir(exist_ok=True, parents=True)
    named = {name: mx.array(array) for name, array in arrays.items()}
    mx.save_safetensors(str(folder / place), named, {"format": marker} if marker else {})


def found(folder: Path) -> mx.array:
    return guesses(folder, ModelConfig.from_folder(folder))


@kinds
@pytest.mark.parametrize("raw", [False, True], ids=["scales", "zero-centred"])
@pytest.mark.parametrize("prefix", ["mtp.", "language_model.mtp.", ""], ids=repr)
@pytest.mark.parametrize("place", PLACES)
def test_in_a_file_of_its_own(tmp_path: Path, kind: str, place: str, prefix: str, raw: bool) -> None:
    tensors, meant = write_bundle(tmp_path / "a", kind)
    if place.startswith("model_extra"):
        prefix = prefix or "mtp."  # it may hold other things too
    put(tmp_path / "a", place, mtp_tensors(tensors, prefix, raw=raw))
    assert mx.array_equal(found(tmp_path / "a"), meant)
    assert survey(tmp_path / "a").mtp_bytes == sum(v.nbytes for v in mtp_tensors(tensors, "", raw=raw).values())


@kinds
@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_as_it_was_trained(tmp_path: Path, kind: str, layout: str) -> None:
    """Copied whole: experts fused, or one by one."""
    tensors, meant = write_bundle(tmp_path / "a", kind)
    head = {name: value for name, value in relayout(tensors, layout).items() if name.startswith("mtp.")}
    put(tmp_path / "a", "mtp.safetensors", head, "pt")
    assert mx.array_equal(found(tmp_path / "a"), meant)


@pytest.mark.parametrize("raw", [False, True], ids=["scales", "zero-centred"])
@pytest.mark.parametrize("prefix", ["mtp.", "language_model.mtp."])
def test_in_the_shards_of_an_mlx_checkpoint(tmp_path: Path, prefix: str, raw: bool) -> None:
    """jang copies norms as they were trained, oMLX turns them into scales: both among norms that are scales."""
    tensors, meant = write_bundle(tmp_path / "a", "moe")
    shards = dict(mx.load(str(tmp_path / "a/model-00001-of-00002.safetensors")))
    shards |= mx.load(str(tmp_path / "a/model-00002-of-00002.safetensors"))
    for path in (tmp_path / "a").glob("model*"):
        path.unlink()
    put(tmp_path / "a", "model.safetensors", shards | mtp_tensors(tensors, prefix, raw=raw))
    assert mx.array_equal(found(tmp_path / "a"), meant)


@kinds
@pytest.mark.parametrize("told", ["own section", "shapes", "modules"])
@pytest.mark.parametrize("place", ["mtp.safetensors", "optiq/mtp.safetensors"])
def test_quantized_otherwise_than_the_model(tmp_path: Path, kind: str, told: str, place: str) -> None:
    config: dict[str, Any] = {"quantization": {"group_size": 64, "bits": 8}}
    if told == "own section":
        config["mtplx_mtp_quantization"] = {**FOUR, "mode": "affine", "prequantized": True, "policy": "x"}
    if told == "modules":
        config["mtplx_mtp_quantization"] = {"group_size": 64, "bits": 8, "fc": FOUR, "layers.0.mlp.down_proj": FOUR}
    config["mlx_lm_extra_tensors"] = {"mtp_file": place, "mtp_tensor_count": 15}
    tensors, _ = write_bundle(tmp_path / "a", kind, **config)
    head = mtp_tensors(tensors, "mtp.", raw=False)
    arrays, _, values = pack(head, lambda path: FOUR if path.endswith(("fc", "down_proj")) or told != "modules" else
                             {"group_size": 64, "bits": 8})  # fmt: skip
    put(tmp_path / "a", place, arrays)
    put(tmp_path / "b", "mtp/weights.safetensors", values)
    for path in (tmp_path / "plain").glob("*"):
        if path.name == "config.json":
            (tmp_path / "b/config.json").write_bytes(path.read_bytes())
    for path in (tmp_path / "a").glob("model*"):
        (tmp_path / "b" / path.name).write_bytes(path.read_bytes())
    assert mx.abs(found(tmp_path / "a") - found(tmp_path / "b")).max().item() < 2e-3


def test_a_section_of_its_own_that_contradicts(tmp_path: Path) -> None:
    told = {"mtplx_mtp_quantization": {"group_size": 32, "bits": 4, "fc": {"group_size": 32, "bits": 8}}}
    tensors, _ = write_bundle(tmp_path / "a", "dense", **told)
    put(tmp_path / "a", "mtp.safetensors", pack(mtp_tensors(tensors, "mtp.", raw=False), lambda path: FOUR)[0])
    with pytest.raises(CheckpointError, match=r"mtp.fc.weight .*\[128, 32\], not as config.json has it"):
        found(tmp_path / "a")


def test_a_drafter_in_a_folder_inside(tmp_path: Path) -> None:
    """Its own config.json says how it is quantized."""
    tensors, _ = write_bundle(tmp_path / "a", "dense")
    arrays, _, values = pack(mtp_tensors(tensors, "", raw=False), lambda path: {"group_size": 64, "bits": 5})
    put(tmp_path / "a", "mtp/model.safetensors", arrays)
    raw = {"model_type": "qwen3_5_mtp", "text_config": config_of("dense")["text_config"],
           "quantization": {"group_size": 64, "bits": 5}}  # fmt: skip
    (tmp_path / "a/mtp/config.json").write_text(json.dumps(raw))
    quantized = found(tmp_path / "a")
    (tmp_path / "a/mtp/model.safetensors").unlink()
    put(tmp_path / "a", "mtp.safetensors", {f"mtp.{name}": value for name, value in values.items()})
    assert mx.abs(found(tmp_path / "a") - quantized).max().item() < 2e-3


@pytest.mark.parametrize(
    "place, marker, config, raw, rule, seen",
    [
        ("optiq/mtp.safetensors", "mlx", {}, True, "hf", "hf"),
        ("optiq/mtp.safetensors", "mlx", {}, False, "hf", "mlx"),
        ("mtp/weights.safetensors", "mlx", {}, False, "mlx", "mlx"),
        ("mtp/weights.safetensors", "mlx", {}, True, "mlx", "hf"),
        ("mtp.safetensors", "mlx", {}, True, None, "hf"),
        ("mtp.safetensors", "pt", {}, True, "hf", "hf"),
        ("mtp.safetensors", "mlx", {"mtplx_mtp_norm_encoding": "delta_plus_one"}, True, "hf", "hf"),
        ("mtp.safetensors", "mlx", {"mtplx_mtp_quantization": {"norm_encoding": "delta"}}, False, "hf", "mlx"),
    ],
)
def test_who_says_how_norms_are_written(
    tmp_path: Path, place: str, marker: str, config: dict[str, Any], raw: bool, rule: str | None, seen: str
) -> None:
    """The values decide, whatever their writer usually does: they cannot be both."""
    tensors, meant = write_bundle(tmp_path / "a", "dense", **config)
    put(tmp_path / "a", place, mtp_tensors(tensors, "mtp.", raw=raw), marker)
    norms = open_head(tmp_path / "a", ModelConfig.from_folder(tmp_path / "a")).norms
    assert (norms.rule, norms.seen, norms.chosen, norms.sure) == (rule, seen, seen, rule == seen)
    assert mx.array_equal(found(tmp_path / "a"), meant)


def test_values_that_say_nothing_leave_it_to_the_writer(tmp_path: Path) -> None:
    tensors, _ = write_bundle(tmp_path / "a", "dense")
    head = {n: np.zeros_like(v) if "norm" in n else v for n, v in mtp_tensors(tensors, "mtp.", raw=True).items()}
    for place, scale in (("optiq/mtp.safetensors", 1), ("mtp/weights.safetensors", 0)):
        put(tmp_path / "a", place, head)
        config = ModelConfig.from_folder(tmp_path / "a")
        assert open_head(tmp_path / "a", config).norms.seen is None
        assert (load_mtp(tmp_path / "a", config).norm.weight == scale).all().item()
        (tmp_path / "a" / place).unlink()


@kinds
@pytest.mark.parametrize("place, raw", [("optiq/mtp.safetensors", True), ("mtp.safetensors", False)])
def test_conversion_puts_it_where_this_package_has_it(tmp_path: Path, kind: str, place: str, raw: bool) -> None:
    told = {"mlx_lm_extra_tensors": {"mtp_file": place}, "mtp_norm_encoding": "delta" if raw else "absolute"}
    tensors, meant = write_bundle(tmp_path / "a", kind, **told)
    put(tmp_path / "a", place, mtp_tensors(tensors, "mtp.", raw=raw))
    out = convert(tmp_path / "a", tmp_path / "b", bits=4)
    config = ModelConfig.from_folder(out)
    assert not {"mlx_lm_extra_tensors", "mtp_norm_encoding"} & config.raw.keys()  # which would speak of the source
    assert open_head(out, config).norms.sure and (out / "mtp/weights.safetensors").exists()
    assert mx.array_equal(guesses(out, config), meant)


def test_twice_or_not_there(tmp_path: Path) -> None:
    tensors, meant = write_bundle(tmp_path / "a", "dense")
    with pytest.raises(CheckpointError, match="has no MTP layer .mtp.* tensors, in the shards or in mtp/weights"):
        found(tmp_path / "a")
    for place in ("mtp.safetensors", "optiq/mtp.safetensors"):
        put(tmp_path / "a", place, mtp_tensors(tensors, "mtp.", raw=True))
    assert mx.array_equal(found(tmp_path / "a"), meant)
    write_checkpoint(tmp_path / "c", config_of("dense"), tensors)
    put(tmp_path / "c", "mtp.safetensors", mtp_tensors(tensors, "mtp.", raw=True))
    with pytest.raises(CheckpointError, match="MTP tensors in its shards and in mtp.safetensors: keep one of them"):
        found(tmp_path / "c")
    assert survey(tmp_path / "c").problem is None  # it is no matter until a head is asked for
    config = config_of("dense") | {"mlx_lm_extra_tensors": {"mtp_file": "mtp.safetensors"}}
    (tmp_path / "c/config.json").write_text(json.dumps(config))
    assert mx.array_equal(found(tmp_path / "c"), meant)
    (tmp_path / "a/config.json").write_text(json.dumps(config | {"mtp_file": "heads/x.safetensors"}))
    for path in ("mtp.safetensors", "optiq/mtp.safetensors"):
        (tmp_path / "a" / path).unlink()
    with pytest.raises(CheckpointError, match="its config.json names mtp.safetensors, which is not there"):
        found(tmp_path / "a")


def test_strangers_in_the_file(tmp_path: Path) -> None:
    tensors, _ = write_bundle(tmp_path / "a", "dense")
    put(tmp_path / "a", "mtp.safetensors", mtp_tensors(tensors, "mtp.", raw=True) | {"other.weight": np.zeros(3)})
    with pytest.raises(CheckpointError, match="mtp.safetensors holds other.weight, which is no MTP tensor"):
        found(tmp_path / "a")
