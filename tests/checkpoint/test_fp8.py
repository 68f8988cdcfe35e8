"""FP8 checkpoints: every code, every block, both forms of experts, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import open_file, open_folder, read, read_header
from mlx_qwen35.checkpoint.forms import blocks
from mlx_qwen35.checkpoint.forms.blocks import Fp8Part
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.part import Part
from mlx_qwen35.conversion import pipeline, task
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import FP8, Written, bfloat16, decode_e4m3, spread, widened, write, write_fp8
from tests.checkpoint.test_quantized import dequantized
from tests.checkpoints import Tensors, loaded, relayout, write_checkpoint

TOKENS = mx.array([[3, 1, 4, 1, 5, 9, 2, 6]])
LAYERS = "model.language_model.layers"
PACKED = "self_attn.q_proj", "linear_attn.in_proj_z", "mlp.experts.up_proj", "mlp.experts.down_proj"


def fused(meant: Tensors) -> Tensors:
    """Tensors of one expert each -> the fused names that relayout() starts from."""
    out = {name: value for name, value in meant.items() if not name.split(".experts.")[-1][0].isdigit()}
    for stem in {name.split(".experts.")[0] for name in meant.keys() - out.keys()}:
        gate, up, down = (
            np.stack([meant[f"{stem}.experts.{e}.{p}_proj.weight"] for e in range(4)]) for p in ("gate", "up", "down")
        )
        out |= {f"{stem}.experts.gate_up_proj": np.concatenate([gate, up], 1), f"{stem}.experts.down_proj": down}
    return out


def published(meant: Tensors) -> dict[str, np.ndarray]:
    """Dequantized values under our names."""
    return dict(loaded(name, value) for name, value in relayout(fused(meant), "mlx").items())


def assert_mlx_lm_agrees(folder: Path) -> None:
    """On the logits of a conversion of folder/a to 4 bits."""
    peer = pytest.importorskip("mlx_lm.utils", reason="mlx-lm is not installed")
    out = convert(folder / "a", folder / "b", group_size=32, dtype="float32")
    theirs, _ = peer.load_model(out)
    assert mx.abs(theirs(TOKENS) - load_model(out)(TOKENS)).max().item() <= 2e-3


def part_of(folder: Path, codes: np.ndarray, scales: np.ndarray, half: int | None = None) -> Fp8Part:
    write(folder / "x.safetensors", {"w": ("F8_E4M3", codes), "w_scale_inv": ("F32", scales.astype(np.float32))})
    entries, _ = read_header(folder / "x.safetensors")
    shape = codes.shape if half is None else (codes.shape[0], codes.shape[1] // 2, codes.shape[2])
    part = blocks.with_scales(Part("w", (entries["w"],), shape, half), entries, "_scale_inv", (128, 128), "BF16")
    assert isinstance(part, Fp8Part)
    return part


def test_every_code(tmp_path: Path) -> None:
    codes = np.array([[code for code in range(256) if code & 0x7F != 0x7F]], np.uint8)
    part = part_of(tmp_path, codes, np.ones((1, 2)))
    assert np.array_equal(np.array(part.finish(part.fetch(), None)), decode_e4m3(codes))
    for code in (0x7F, 0xFF):
        codes[0, 200] = code
        part = part_of(tmp_path, codes, np.ones((1, 2)))
        with pytest.raises(CheckpointError, match=rf"w in x.safetensors holds NaN .*0x{code:02X}\) at \[0, 200\]"):
            part.finish(part.fetch(), None)


@pytest.mark.parametrize("pieces", [1 << 24, 300], ids=["whole", "pieces"])
@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (300, 130), (129, 127)])
def test_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], pieces: int) -> None:
    """Any rows of any matrix get the scales of their blocks."""
    monkeypatch.setattr(blocks, "_PIECE_VALUES", pieces)
    rng = np.random.RandomState(0)
    codes = rng.randint(0, 0x7F, shape).astype(np.uint8)
    scales = rng.uniform(0.5, 2, [-(-size // 128) for size in shape]).astype(np.float32)
    part, meant = part_of(tmp_path, codes, scales), decode_e4m3(codes) * spread(scales, shape)
    for start, stop in {(0, shape[0]), (shape[0] // 2, shape[0]), (shape[0] - 1, shape[0])}:
        assert np.array_equal(np.array(part.finish(part.fetch(start, stop), None)), meant[start:stop])


@pytest.mark.parametrize("inner", [128, 96])
def test_halves_of_fused_experts(tmp_path: Path, inner: int) -> None:
    rng = np.random.RandomState(0)
    shape = (3, 2 * inner, 136)
    codes = rng.randint(0, 0x7F, shape).astype(np.uint8)
    scales = rng.uniform(0.5, 2, (3, -(-2 * inner // 128), 2)).astype(np.float32)
    meant = decode_e4m3(codes) * spread(scales, shape)
    for half in (0, 1):
        part = part_of(tmp_path, codes, scales, half)
        found = np.array(part.finish(part.fetch(1, 3), None))
        assert np.array_equal(found, meant[1:, half * inner : (half + 1) * inner])
    codes[2, 2 * inner - 1, 5] = 0x7F
    part = part_of(tmp_path, codes, scales, 1)
    with pytest.raises(CheckpointError, match=rf"at \[2, {2 * inner - 1}, 5\]"):
        part.finish(part.fetch(1, 3), None)


@pytest.mark.parametrize("kind, layout", [("dense", "hf"), ("moe", "hf-per-expert"), ("moe", "hf")])
def test_load(tmp_path: Path, kind: str, layout: str) -> None:
    """Values, dtypes and logits are those of the dequantized weights."""
    meant = write_fp8(tmp_path / "a", kind, layout)
    model = load_model(tmp_path / "a", dtype="float32")
    values = published(meant) if layout != "hf" else dict(loaded(n, v) for n, v in relayout(meant, "mlx").items())
    found = dequantized(model)
    assert found.keys() == values.keys()
    assert all(np.array_equal(np.array(found[name]), value) for name, value in values.items())
    config = json.loads((tmp_path / "a/config.json").read_text())
    del config["quantization_config"]
    other = load_model(write_checkpoint(tmp_path / "b", config, meant, layout="hf"))(TOKENS)
    assert mx.abs(model(TOKENS) - other).max().item() <= 2e-3 and mx.abs(other).max().item() > 0.1
    if kind == "dense":
        half = load_model(tmp_path / "a", dtype="bfloat16").layers[0].mlp.up_proj.weight
        assert half.dtype == mx.bfloat16
        assert mx.array_equal(half, mx.array(values["layers.0.mlp.up_proj.weight"]).astype(mx.bfloat16))


@pytest.mark.parametrize("layout", ["hf-per-expert", "hf"])
def test_convert_to_4_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Bit for bit what the dequantized float32 weights give, their scales in the model's dtype; in small pieces too."""
    meant = write_fp8(tmp_path / "a", "moe", layout)
    values = published(meant) if layout != "hf" else dict(loaded(n, v) for n, v in relayout(meant, "mlx").items())
    monkeypatch.setattr(task, "PIECE_BYTES", 20_000)
    seen: list[tuple[int, int]] = []
    out = convert(
        tmp_path / "a", tmp_path / "b", group_size=32, recipe="uniform", dtype="bfloat16",
        on_progress=lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    total = sum(entry.nbytes for entry in open_folder(tmp_path / "a").entries.values())
    assert seen[-1] == (total, total) and len(seen) > 50
    model = load_model(out, dtype="bfloat16")
    compared = 0
    for number, layer in enumerate(model.layers):
        for path in PACKED:
            module: Any = layer
            for name in path.split("."):
                module = getattr(module, name, None)
            if module is None:
                continue
            compared += 1
            weight, scales, biases = mx.quantize(mx.array(values[f"layers.{number}.{path}.weight"]), 32, 4)
            assert mx.array_equal(module.weight, weight), path
            assert mx.array_equal(module.scales, scales.astype(mx.bfloat16)), path
            assert mx.array_equal(module.biases, biases.astype(mx.bfloat16)), path
    assert compared == 6
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == config["quantization"] and "quant_method" not in config["quantization"]


def test_memory_does_not_grow_with_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "PIECE_BYTES", 1 << 17)
    monkeypatch.setattr(pipeline, "workers", lambda: 1)
    peaks = []
    for experts in (8, 32):
        write_fp8(tmp_path / f"a{experts}", num_experts=experts)
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        convert(tmp_path / f"a{experts}", tmp_path / f"b{experts}", group_size=32, recipe="uniform")
        peaks.append(mx.get_peak_memory() - before)
    assert peaks[1] <= peaks[0] * 1.1 and peaks[1] < 6 << 17, peaks


def test_what_lies_beside_is_dequantized(tmp_path: Path) -> None:
    """The MTP layer is FP8 too, and goes over unquantized; the tower was never FP8."""
    meant = write_fp8(tmp_path / "a")
    found = open_file(convert(tmp_path / "a", tmp_path / "b") / "mtp/weights.safetensors").entries
    mtp = {name: read(entry) for name, entry in found.items()}
    assert not [name for name in mtp if "scale" in name] and len(mtp) == 20
    assert np.array_equal(mtp["mtp.layers.0.self_attn.q_proj.weight"], meant["mtp.layers.0.self_attn.q_proj.weight"])
    ups = np.stack([meant[f"mtp.layers.0.mlp.experts.{e}.up_proj.weight"] for e in range(4)])
    assert np.array_equal(mtp["mtp.layers.0.mlp.switch_mlp.up_proj.weight"], ups)


def test_dtype_of_what_is_not_quantized(tmp_path: Path) -> None:
    """Of the model that was quantized, as config.json says it, unless another is wanted."""
    meant = write_fp8(tmp_path / "a", "dense")
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    config["text_config"]["dtype"] = "bfloat16"
    path.write_text(json.dumps(config))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    entry = open_folder(convert(tmp_path / "a", tmp_path / "b", bits=None)).entries[name]
    assert entry.dtype == "BF16" and np.array_equal(read(entry), bfloat16(meant[f"{LAYERS}.0.mlp.up_proj.weight"]))


def test_mlx_lm_loads_it(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a")
    assert_mlx_lm_agrees(tmp_path)


UP = f"{LAYERS}.1.mlp.experts.2.up_proj.weight"


def put(name: str, tag: str, value: np.ndarray) -> Callable[[Written], Any]:
    return lambda written: written.update({name: (tag, value)})


def spoil(name: str, place: tuple[int, ...], value: int) -> Callable[[Written], Any]:
    return lambda written: written[name][1].__setitem__(place, value)


REFUSED: dict[str, tuple[Callable[[Written], Any], str]] = {
    "no scale": (
        lambda w: w.pop(f"{UP}_scale_inv"),
        r"experts.2.up_proj.weight in model.safetensors is FP8, and its scales .*up_proj.weight_scale_inv are in none "
        r"of the files \(expected F32/F16/BF16 \[1, 2\]\)",
    ),
    "blocks of another size": (
        put(f"{UP}_scale_inv", "BF16", np.zeros((2, 3), np.uint16)),
        r"up_proj.weight_scale_inv in .* has shape \[2, 3\], expected \[1, 2\]: .*128 x 128 of \[96, 160\]",
    ),
    "scales of bytes": (put(f"{UP}_scale_inv", "U8", np.zeros((1, 2), np.uint8)), "scale_inv .*dtype U8, expected F32"),
    "scale of nothing": (
        put(f"{LAYERS}.0.mlp.gate.weight_scale_inv", "BF16", np.zeros((1, 2), np.uint16)),
        "gate.weight_scale_inv in model.safetensors is left over: its weight is missing or not FP8",
    ),
    "one expert unquantized": (
        put(UP, "BF16", np.zeros((96, 160), np.uint16)), "up_proj.weight .*dtype BF16, expected F8_E4M3 as its neighb"
    ),
    "a norm in FP8": (
        put("model.language_model.norm.weight", "F8_E4M3", np.zeros(160, np.uint8)),
        "norm.weight .*dtype F8_E4M3, expected F32/F16/BF16: FP8 is read in linear maps only",
    ),
    "other FP8": (put(UP, "F8_E5M2", np.zeros((96, 160), np.uint8)), "up_proj.weight .*dtype F8_E5M2, expected"),
    "a shape": (put(UP, "F8_E4M3", np.zeros((96, 128), np.uint8)), r"up_proj.weight .*\[96, 128\], its neighbours"),
    "a code that is NaN": (spoil(UP, (95, 159), 0xFF), rf"{UP} in .* holds NaN .*0xFF\) at \[95, 159\].*download"),
    "a scale that is NaN": (
        spoil(f"{UP}_scale_inv", (0, 1), 0x7FC0), "experts.2.up_proj.weight_scale_inv .* holds NaN or infinite scales"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str) -> None:
    change, message = REFUSED[case]
    write_fp8(tmp_path / "a", change=change)
    for attempt in (lambda: load_model(tmp_path / "a"), lambda: convert(tmp_path / "a", tmp_path / "b")):
        with pytest.raises(CheckpointError, match=message):
            attempt()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"weight_block_size": [128, 64]}, r"scale_inv .* has shape .*: a scale for each block of 128 x 64 of"),
        ({"weight_block_size": [128, 0]}, r"config.json: quantization_config.weight_block_size is \[128, 0\]"),
        ({"weight_block_size": None}, r"weight_scale_inv in .* has shape .*, expected \[\] or \[1\] or"),
        ({"fmt": "e5m2"}, "quantization_config.fmt is 'e5m2', and only 'e4m3' is read"),
        ({"quant_method": "fbgemm_fp8"}, "quant_method is 'fbgemm_fp8', which is not supported yet.*take the unquant"),
    ],
)
def test_other_kinds_of_fp8_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_fp8(tmp_path / "a", "dense", section=FP8 | changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(tmp_path / "a")


def test_codes_without_a_word_in_config(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a", "dense")
    path = tmp_path / "a/config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="has dtype F8_E4M3.*where config.json's quantization_config says so"):
        load_model(tmp_path / "a")


def test_mtp_without_its_scale(tmp_path: Path) -> None:
    name = "mtp.layers.0.self_attn.q_proj.weight_scale_inv"
    write_fp8(tmp_path / "a", change=lambda written: written.pop(name))
    with pytest.raises(CheckpointError, match=f"its scales {name} are in none of the files"):
        convert(tmp_path / "a", tmp_path / "b")
    write_fp8(tmp_path / "c", change=put("mtp.fc.weight_scale_inv", "BF16", np.zeros((2, 3), np.uint16)))
    with pytest.raises(CheckpointError, match="mtp.fc.weight_scale_inv in .* is left over"):
        convert(tmp_path / "c", tmp_path / "b")


def test_truncated(tmp_path: Path) -> None:
    write_fp8(tmp_path / "a", "dense")
    path = tmp_path / "a/model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(CheckpointError, match="ends early.*first tensor cut off is"):
        load_model(tmp_path / "a")


def test_the_decoder_of_these_tests() -> None:
    """Against values that the format's definition names."""
    named = {0x00: 0, 0x01: 2**-9, 0x07: 7 * 2**-9, 0x08: 2**-6, 0x38: 1, 0x7E: 448, 0xFE: -448, 0xB9: -1.125}
    assert {code: float(decode_e4m3(np.array(code))) for code in named} == named
    assert np.isnan(decode_e4m3(np.array([0x7F, 0xFF]))).all() and widened(bfloat16(np.float32(1.5))) == 1.5
