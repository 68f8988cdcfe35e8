"""A target size is kept to the byte of the written folder, and the bits go where they save most."""

import functools
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.inventory import Shape, is_linear, text_tensors
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.quantize import unpack
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import BITS, ModelConfig, QuantSpec
from mlx_qwen35.conversion import recipes
from mlx_qwen35.conversion.allotment import _Choice, _forms, _packed_bytes, allot, fit
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.conversion.recipes import role
from mlx_qwen35.conversion.rounding import pack
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.test_quantized import FFN, SIZES
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint
from tests.conversion.test_recipes import published


@pytest.fixture(params=["dense", "moe"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = tiny_config(request.param, vision=True, mtp_num_hidden_layers=1, **SIZES, **FFN[request.param])
    write_checkpoint(tmp_path / "source", config, random_tensors(config, 3))
    (tmp_path / "source" / "tokenizer.json").write_text("{}" * 100)
    return tmp_path / "source"


def bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def smallest(ask: Callable[[int], object]) -> int:
    """The least that the error names."""
    with pytest.raises(CheckpointError, match=r"is too small .* Give at least \d+ bytes") as error:
        ask(1000)
    return int(str(error.value).split()[-2])


def test_size_is_kept(source: Path) -> None:
    least = smallest(lambda size: convert(source, source.parent / "none", target_size=size))
    assert not (source.parent / "none").exists()
    whole = bytes_of(source)
    before = 0
    for part in (0.0, 0.3, 1.0):
        target = int(least + part * (whole - least))
        out = convert(source, source.parent / f"{part}", target_size=target)
        written = bytes_of(out)
        assert written <= target
        assert before < written  # and what there is, is used
        before = written
        load_model(out)
    with pytest.raises(CheckpointError, match="too small"):
        convert(source, source.parent / "under", target_size=least - 1)


def test_size_is_kept_in_another_dtype(tmp_path: Path) -> None:
    """Scales and what is left unquantized take twice the bytes of the source's."""
    config = tiny_config("moe", vision=True, mtp_num_hidden_layers=1, **SIZES, **FFN["moe"])
    source = write_checkpoint(tmp_path / "source", config, random_tensors(config, 3), dtype="bfloat16")
    for part in (0.8, 1.2):
        target = int(part * bytes_of(source))
        assert bytes_of(convert(source, tmp_path / f"{part}", target_size=target, dtype="float32")) <= target


@pytest.mark.parametrize("asked", [{"mode": mode} for mode in ("mxfp4", "mxfp8", "nvfp4")] + [{"recipe": "uniform"}])
def test_a_mode_has_no_target_size(source: Path, asked: dict[str, str]) -> None:
    """It would be made of other forms than those that were asked for."""
    (what, name), = asked.items()
    with pytest.raises(CheckpointError, match=f"target_size chooses affine bits .* {what} '{name}' .*one of them"):
        convert(source, source.parent / "none", target_size=10**9, **asked)
    with pytest.raises(CheckpointError, match="groups of 16: give no mode"):
        fit(open_source(source), 10**9, group_size=16)


@pytest.mark.parametrize("group_size", [32, 128])
def test_the_least(source: Path, group_size: int) -> None:
    """2 bits in the largest groups that divide the rows; what chooses experts keeps 8, in the groups asked for."""
    origin = open_source(source)
    found = fit(origin, smallest(lambda size: fit(origin, size, group_size=group_size)), group_size=group_size)
    modules = linear(origin.config)
    assert set(found) == set(modules)
    for module, spec in found.items():
        chooses = module.endswith(("mlp.gate", "mlp.shared_expert_gate"))
        least = QuantSpec(8, group_size, "affine") if chooses else QuantSpec(2, 128, "affine")
        assert spec == recipes.fitted(least, modules[module])
    assert {spec.group_size for spec in found.values()} >= {64, 128}


@pytest.mark.parametrize(("group_size", "wide", "narrow"), [(32, {32, 64, 128}, {32, 64}), (128, {128}, {64})])
def test_groups_are_as_large_as_asked_or_larger(
    source: Path, group_size: int, wide: set[int], narrow: set[int]
) -> None:
    origin = open_source(source)
    seen = set()
    for module, shape in linear(origin.config).items():
        if not recipes.is_fixed(module):
            found = _forms(origin, module, shape, group_size, 0)
            assert {spec.group_size for spec in found if spec} == (narrow if shape[-1] % 128 else wide)
            assert {spec and spec.bits for spec in found} == {None, *BITS["affine"]}
            seen.add(shape[-1] % 128 == 0)
    assert seen == {True, False}


def test_too_small_a_size_is_known_before_anything_is_measured(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_qwen35.conversion.allotment.sample_rows", lambda *_: pytest.fail("it is read"))
    smallest(lambda size: fit(open_source(source), size))


@pytest.mark.parametrize("size", ["0.8B", "27B", "35B", "397B"])
def test_published_sizes(size: str) -> None:
    """With normal weights of the published shapes: what decides how fast a state fades has the least bits only where
    nearly all have, and more than most of the model as soon as a hundredth more than that is there."""
    modules = linear(published(size))
    weights = recipes.sensitivities(modules)
    choices = {
        module: [
            _Choice(spec, _packed_bytes(shape, spec, 2), weights[module] * error)
            for spec, error in (() if recipes.is_fixed(module) else errors())
        ]
        or [_Choice(steering := QuantSpec(8, 64, "affine"), _packed_bytes(shape, steering, 2), 0.0)]
        for module, shape in modules.items()
    }
    least = sum(min(choice.nbytes for choice in found) for found in choices.values())
    before = math.inf
    for part in (1.0, 1.01, 1.1, 1.3, 2.0):
        found = allot(choices, int(part * least))
        assert sum(choice.nbytes for choice in found.values()) <= part * least
        loss = sum(choice.loss for choice in found.values())
        assert loss < before
        before = loss
        bits = {module: choice.spec.bits for module, choice in found.items()}
        bulk = {bits[m] for m in bits if role(m) in ("experts", "mlp") and not m.endswith("down_proj")}
        fading = {bits[m] for m in bits if m.endswith(("in_proj_a", "in_proj_b"))}
        assert {bits[m] for m in bits if recipes.is_fixed(m)} <= {8}
        assert bulk == fading == {2} if part == 1.0 else min(fading) > max(bulk)


def linear(config: ModelConfig) -> dict[str, Shape]:
    return {name.removesuffix(".weight"): s for name, s in text_tensors(config).items() if is_linear(name, s)}


@functools.cache
def errors() -> tuple[tuple[QuantSpec, float], ...]:
    """Of each form in groups of 64 and 128, relative, on normal weights."""
    x = mx.random.normal((64, 512), key=mx.random.key(0))
    specs = [QuantSpec(bits, group, "affine") for bits in BITS["affine"] for group in (64, 128)]
    made = [unpack(pack(x, spec, search=True), spec) for spec in specs]
    return tuple((s, (mx.square(m - x).sum() / mx.square(x).sum()).item()) for s, m in zip(specs, made, strict=True))


def test_more_room_loses_no_more(source: Path) -> None:
    draw = np.random.RandomState(0)
    choices = {
        str(number): [
            _Choice(QuantSpec(bits, 64, "affine"), size * bits, float(draw.rand() * 4.0**-bits)) for bits in (2, 4, 8)
        ]
        for number, size in enumerate(draw.randint(1, 50, 40))
    }
    losses = [
        sum(choice.loss for choice in allot(choices, room).values())
        for room in range(sum(found[0].nbytes for found in choices.values()), 9000, 7)
    ]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0] / 100


def test_close_to_the_best_there_is() -> None:
    """Against all mixtures: at most one step short of the best of the same size."""
    draw = np.random.RandomState(1)
    for _ in range(20):
        choices = {
            str(n): [_Choice(None, int(size * bits), float(s * 4.0**-bits)) for bits in (2, 3, 4, 6, 8)]
            for n, (size, s) in enumerate(zip(draw.randint(1, 9, 4), draw.rand(4) * 10, strict=True))
        }
        room = int(draw.randint(60, 160))
        mixtures = [m for m in itertools.product(*choices.values()) if sum(c.nbytes for c in m) <= room]
        if not mixtures:
            continue
        best = min(sum(c.loss for c in m) for m in mixtures)
        found = allot(choices, room)
        assert sum(c.nbytes for c in found.values()) <= room
        step = max(max(c.nbytes for c in cs) - min(c.nbytes for c in cs) for cs in choices.values()) // 2
        less = [sum(c.loss for c in m) for m in mixtures if sum(c.nbytes for c in m) <= room - step]
        assert best <= sum(c.loss for c in found.values()) <= min(less, default=np.inf) + 1e-12


def test_sensitive_roles_get_more(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The measured sensitivity decides: turned around, it turns the result around."""
    origin = open_source(source)
    middle = 2 * smallest(lambda size: fit(origin, size))

    def bits(kind: str) -> float:
        found = [s.bits if s else 16 for m, s in fit(origin, middle).items() if role(m) == kind]
        return sum(found) / len(found)

    def set_attention(value: float) -> None:
        found = {kind: value if "attention" in kind else 1.0 for kind in recipes.SENSITIVITY}
        monkeypatch.setattr(recipes, "SENSITIVITY", found)

    set_attention(100.0)
    more = bits("attention")
    set_attention(0.01)
    assert bits("attention") < more - 1


def test_what_has_its_form_goes_over(source: Path) -> None:
    """A quantized source: a module keeps what it has where that is what there is room for, and is never made larger."""
    middle = convert(source, source.parent / "four", bits=4, group_size=32, recipe="uniform")
    origin = open_source(middle)
    found = fit(origin, bytes_of(source), group_size=32)
    assert found == origin.specs | {m: s for m, s in found.items() if m not in origin.specs}
    assert all(spec.bits == 4 for m, spec in found.items() if spec and role(m) != "steering")


def test_progress(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    fit(open_source(source), bytes_of(source), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(n + 1, seen[-1][1]) for n in range(seen[-1][1])]
