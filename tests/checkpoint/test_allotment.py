"""A target size is kept to the byte of the written folder, and the bits go where they save most."""

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35.checkpoint import recipes
from mlx_qwen35.checkpoint.allotment import _Choice, allot, fit
from mlx_qwen35.checkpoint.convert import convert
from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.recipes import role
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.test_quantized import FFN, SIZES
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint


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


def test_steering_keeps_its_bits(source: Path) -> None:
    origin = open_source(source)
    found = fit(origin, smallest(lambda size: fit(origin, size)))
    shapes = text_tensors(origin.config)
    assert set(found) == {name.removesuffix(".weight") for name, shape in shapes.items() if is_linear(name, shape)}
    for module, spec in found.items():
        if role(module) == "steering":
            assert spec is None or spec.bits == 8
        else:
            assert spec.bits == 2


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
