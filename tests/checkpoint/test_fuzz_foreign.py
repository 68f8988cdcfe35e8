"""Damaged FP8 and GPTQ checkpoints: a CheckpointError that says where, or the very same model; in convert() too.

Never another error, a crash, or a wrong model. Only what can be noticed is damaged: numbers that are as good as any
other are weights.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import Written, write_fp8, write_gptq
from tests.checkpoint.test_fuzz import cut, digit, drop, flip
from tests.checkpoint.test_quantized import dequantized
from tests.soak import examples

ROUNDS = examples(120, 2)
FILE = "model.safetensors"
SIZES = {"hidden_size": 64, "head_dim": 16, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 96,
         "linear_value_head_dim": 24, "num_experts": 3, "rope_parameters": {"mrope_section": [2, 1, 1]}}  # fmt: skip
# Another dtype of as many bytes, which is no way to read the numbers.
STRANGE = {"BF16": ("I16", "U16"), "F16": ("I16", "U16"), "F32": ("I32", "U32"), "I32": ("F32", "U32"),
           "F8_E4M3": ("U8", "I8", "F8_E5M2")}  # fmt: skip
Write = Callable[[Path, Callable[[Written], Any] | None], Any]
Rng = np.random.RandomState


def fp8(folder: Path, change: Callable[[Written], Any] | None = None) -> None:
    write_fp8(folder, "moe", change=change, **SIZES)


def gptq(folder: Path, change: Callable[[Written], Any] | None = None) -> None:
    write_gptq(folder, "moe", change=change, sizes=SIZES)


@pytest.fixture(scope="module", params=[fp8, gptq], ids=lambda write: write.__name__)
def write(request: pytest.FixtureRequest) -> Write:
    return request.param


@pytest.fixture(scope="module")
def whole(write: Write, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign") / "whole"
    write(folder, None)
    return folder


@pytest.fixture(scope="module")
def expected(whole: Path) -> dict[str, mx.array]:
    return weights(whole)


def weights(folder: Path) -> dict[str, mx.array]:
    """What the weights are worth: in order or not, packed or not, columns of GPTQ give the same values."""
    return dequantized(load_model(folder, dtype="float32"))


def refused(folder: Path, expected: dict[str, mx.array], what: str, *named: str) -> bool:
    """Whether load_model() refuses; where it does not, the model has to be the same."""
    try:
        found = weights(folder)
    except CheckpointError as error:
        said = str(error)
        assert str(folder) in said or FILE in said, f"{what}: {said}"
        assert any(name in said for name in named or ("",)), f"{what}: {said}"
        return True
    assert found.keys() == expected.keys(), what
    assert all(mx.array_equal(found[name], expected[name]) for name in expected), what
    return False


def names_of(written: Written, *, mtp: bool = False) -> list[str]:
    return sorted(name for name in written if mtp or not name.startswith("mtp."))


def pick(names: list[str], rng: Rng) -> str:
    """Any kind of tensor as often as any other: the experts are most of them."""
    kinds = sorted({name.split(".")[-1] for name in names})
    kind = kinds[rng.randint(len(kinds))]
    chosen = [name for name in names if name.split(".")[-1] == kind]
    return chosen[rng.randint(len(chosen))]


# Each damages a tensor so that it can be noticed, and returns its name.
def without(written: Written, name: str, rng: Rng) -> None:
    del written[name]


def renamed(written: Written, name: str, rng: Rng) -> None:
    place = rng.randint(len(name))
    written[f"{name[:place]}x{name[place:]}"] = written.pop(name)


def doubled(written: Written, name: str, rng: Rng) -> None:
    written[f"{name}_scale_inv" if rng.randint(2) else f"{name}.more"] = written[name]


def of_another_dtype(written: Written, name: str, rng: Rng) -> None:
    tag, value = written[name]
    written[name] = STRANGE[tag][rng.randint(len(STRANGE[tag]))], value


def reshaped(written: Written, name: str, rng: Rng) -> None:
    tag, value = written[name]
    shapes = [value.shape[::-1], (value.size,), (1, *value.shape), (*value.shape, 1), (value.size, 1)]
    others = [shape for shape in shapes if shape != value.shape]
    written[name] = tag, value.reshape(others[rng.randint(len(others))])


def resized(written: Written, name: str, rng: Rng) -> None:
    tag, value = written[name]
    axis = rng.randint(value.ndim)
    sizes = [size for size in (0, 1, value.shape[axis] - 1) if size != value.shape[axis]]
    less = np.take(value, np.arange(sizes[rng.randint(len(sizes))]), axis)
    written[name] = tag, less if rng.randint(2) else np.concatenate([value, np.take(value, [0], axis)], axis)


SHAPES = [without, renamed, doubled, of_another_dtype, reshaped, resized]


@pytest.mark.parametrize("damage", SHAPES, ids=lambda damage: damage.__name__)
def test_tensors(write: Write, expected: dict[str, mx.array], tmp_path: Path, damage: Callable[..., None]) -> None:
    """Missing, left over, of another name, shape or kind: each is refused, and named."""
    for seed in range(ROUNDS // 6):
        rng, folder = Rng(seed), tmp_path / str(seed)
        concerned: list[str] = []

        def change(written: Written, rng: Rng = rng, concerned: list[str] = concerned) -> None:
            name, before = pick(names_of(written), rng), set(written)
            damage(written, name, rng)
            concerned += [name, name.rpartition(".")[0], *(set(written) - before)]

        write(folder, change)
        what = f"{damage.__name__} {concerned[0]}"
        assert refused(folder, expected, what, *concerned), f"{what} was not noticed"
        with pytest.raises(CheckpointError):
            convert(folder, tmp_path / f"{seed}-out")
        shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []


def test_mtp_tensors(write: Write, tmp_path: Path) -> None:
    """load_model() leaves them alone, and convert() does not: it refuses, or writes what was there."""
    noticed = 0
    for seed in range(20):
        rng, folder = Rng(seed), tmp_path / str(seed)

        def change(written: Written, rng: Rng = rng) -> None:
            name = pick([name for name in names_of(written, mtp=True) if name.startswith("mtp.")], rng)
            SHAPES[rng.randint(len(SHAPES))](written, name, rng)

        write(folder, change)
        try:
            convert(folder, tmp_path / f"{seed}-out", bits=None)
        except CheckpointError as error:
            assert "mtp." in str(error) or str(folder) in str(error)
            noticed += 1
            assert not (tmp_path / f"{seed}-out").exists()
        else:
            load_model(tmp_path / f"{seed}-out")
    assert noticed > 20 / 3


def not_finite(written: Written, rng: Rng) -> str:
    """A scale, or in FP8 a code, that is NaN or infinite."""
    codes = [name for name, (tag, _) in written.items() if tag == "F8_E4M3" and not name.startswith("mtp.")]
    scales = [name for name in names_of(written) if name.endswith(("_scale_inv", ".scales"))]
    name = pick(codes + scales, rng)
    tag, value = written[name]
    value = np.array(value)
    bad = {"F8_E4M3": (0x7F, 0xFF), "BF16": (0x7FC0, 0x7F80, 0xFF80, 0xFFFF), "F16": (np.nan, np.inf, -np.inf)}[tag]
    value.flat[rng.randint(value.size)] = bad[rng.randint(len(bad))]
    written[name] = tag, value
    return name


@pytest.mark.parametrize("target", [{}, {"bits": None}, {"mode": "mxfp8"}], ids=str)
def test_not_finite(write: Write, tmp_path: Path, target: dict[str, Any]) -> None:
    for seed in range(ROUNDS // 6):
        folder, chosen = tmp_path / str(seed), []
        write(folder, lambda written, seed=seed, chosen=chosen: chosen.append(not_finite(written, Rng(seed))))
        stem = chosen[0].removesuffix("_scale_inv").rpartition(".")[0]
        with pytest.raises(CheckpointError) as caught:
            convert(folder, tmp_path / "out", **target)
        assert stem in str(caught.value)
        if write is fp8:
            with pytest.raises(CheckpointError, match=stem.replace(".", r"\.")):
                load_model(folder)
        shutil.rmtree(folder)
    assert list(tmp_path.iterdir()) == []


def integers(written: Written, rng: Rng) -> str:
    """Another zero, or a column in another group."""
    name = pick([name for name in names_of(written) if name.endswith((".qzeros", ".g_idx"))], rng)
    tag, value = written[name]
    value = np.array(value)
    place = rng.randint(value.size)
    value.flat[place] ^= 1 << rng.randint(31)
    written[name] = tag, value
    return name


def test_integers_that_mean_something(tmp_path: Path) -> None:
    for seed in range(ROUNDS // 3):
        folder, chosen = tmp_path / str(seed), []
        gptq(folder, lambda written, seed=seed, chosen=chosen: chosen.append(integers(written, Rng(seed))))
        for attempt in (lambda f=folder: load_model(f), lambda f=folder: convert(f, tmp_path / "out")):
            with pytest.raises(CheckpointError, match=chosen[0].replace(".", r"\.")):
                attempt()
        shutil.rmtree(folder)


def test_damaged_bytes(whole: Path, expected: dict[str, mx.array], tmp_path: Path) -> None:
    """Of the header and of config.json; a file that ends anywhere."""
    ways = [flip, cut, drop, digit]
    shutil.copytree(whole, tmp_path / "a")
    header = 8 + int.from_bytes((whole / FILE).read_bytes()[:8], "little")
    for file, end in ((FILE, header), ("config.json", (whole / "config.json").stat().st_size)):
        raw, count = (whole / file).read_bytes(), 0
        for seed in range(ROUNDS):
            damaged = ways[seed % 4](raw, end, Rng(seed))
            (tmp_path / "a" / file).write_bytes(damaged)
            count += damaged != raw and refused(tmp_path / "a", expected, f"{file}, {ways[seed % 4].__name__} {seed}")
        assert count > ROUNDS / 3
        (tmp_path / "a" / file).write_bytes(raw)
    raw = (whole / FILE).read_bytes()
    for seed in range(ROUNDS // 6):
        (tmp_path / "a" / FILE).write_bytes(raw[: Rng(seed).randint(len(raw))])
        assert refused(tmp_path / "a", expected, f"cut {seed}")


VALUES: list[Any] = [None, True, False, 0, 1, -1, 2, 3, 64, 1 << 40, 0.5, "", "fp8", "gptq", "awq", [], [128], [64, 64],
                     [128, 128, 128], [0, 0], ["128", "128"], {}, {"bits": 4}, "e5m2", "gptq_v2", "marlin"]  # fmt: skip


def test_inconsistent_config(whole: Path, expected: dict[str, mx.array], tmp_path: Path) -> None:
    """Every word of quantization_config, taken away or said otherwise; and its place."""
    shutil.copytree(whole, tmp_path / "a")
    path, count, tries = tmp_path / "a/config.json", 0, 0
    config = json.loads(path.read_text())
    section = config["quantization_config"]
    sections: list[tuple[str, Any]] = []
    for gone in section:
        sections.append((f"{gone} away", {key: value for key, value in section.items() if key != gone}))
    sections += [(f"{key} {value!r}", section | {key: value}) for key in section for value in VALUES]
    sections += [(repr(value), value) for value in VALUES]
    sections += [("checkpoint_format gptq_v2", section | {"checkpoint_format": "gptq_v2"}),
                 ("both", section | {"bits": 4, "group_size": 64, "mode": "affine"})]  # fmt: skip
    for what, said in sections:
        path.write_text(json.dumps(config | {"quantization_config": said}))
        count, tries = count + refused(tmp_path / "a", expected, what), tries + 1
    assert tries / 4 < count < tries
    for also in ({"quantization": {"bits": 4, "group_size": 32, "mode": "affine"}}, {"quantization": {}}):
        path.write_text(json.dumps(config | also))
        assert refused(tmp_path / "a", expected, str(also))
