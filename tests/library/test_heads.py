"""Whether a head's norms are read as they are meant, by what the head guesses: the demo's, written in several ways."""

import json
import shutil
import warnings
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_qwen35 import load, load_draft_model
from mlx_qwen35.checkpoint import norms
from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.checkpoint.mtp import MTPHead, load_mtp
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import Qwen35Warning
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library import demo_folder, drafting
from mlx_qwen35.library.drafting import load_head

PLACE = "mtp/weights.safetensors"


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo in MLX's form, its head in a file with norms that are scales."""
    return convert(demo_folder(), tmp_path_factory.mktemp("demo") / "mlx", bits=None)


@pytest.fixture
def folder(converted: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(converted, tmp_path / "a"))


def rewrite(folder: Path, place: str, by: float) -> None:
    """Move the head to another place and add to its norms."""
    head = dict(mx.load(str(folder / PLACE)))
    head = {n: (v.astype(mx.float32) + by).astype(v.dtype) if "norm" in n else v for n, v in head.items()}
    mx.eval(head)
    (folder / PLACE).unlink()
    (folder / place).parent.mkdir(exist_ok=True)
    mx.save_safetensors(str(folder / place), head, {"format": "mlx"})


def assert_right(head: MTPHead, folder: Path) -> None:
    other = load_mtp(demo_folder(), load_model(folder).config)
    assert mx.allclose(head.norm.weight, other.norm.weight, atol=0.02).item()
    assert mx.allclose(head.pre_fc_norm_hidden.weight, other.pre_fc_norm_hidden.weight, atol=0.02).item()


@pytest.mark.parametrize(
    "place, by, said",
    [
        (PLACE, 0, None),
        ("mtp.safetensors", 0, None),
        ("mtp.safetensors", -1, None),
        ("optiq/mtp.safetensors", -1, None),
        (PLACE, -1, "read as zero-centred, though their writer is known to have them otherwise"),
        ("optiq/mtp.safetensors", 0, "read as plain scales, though their writer"),
    ],
)
def test_either_convention_in_any_place(folder: Path, place: str, by: float, said: str | None) -> None:
    rewrite(folder, place, by)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model, _ = load(folder, mtp=True)
    assert_right(model.mtp, folder)
    told = [str(warning.message) for warning in caught if warning.category is Qwen35Warning]
    assert len(told) == (said is not None) and all(said in line for line in told)


@pytest.mark.parametrize("place, by", [("optiq/mtp.safetensors", 0), (PLACE, -1), ("mtp.safetensors", -1)])
def test_the_heads_own_guesses_decide(folder: Path, place: str, by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where values tell nothing and the writer is known for the other, or for nothing."""
    rewrite(folder, place, by)
    monkeypatch.setattr(norms, "written", lambda entries: None)
    model = load_model(folder)
    with pytest.warns(Qwen35Warning, match=r"norms of its MTP layer are read as .* it guesses \d+ of 23 tokens, and"):
        assert_right(load_head(folder, model), folder)


def test_a_head_that_is_no_better_otherwise_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head of random weights guesses nothing either way."""
    rewrite(folder, "mtp.safetensors", 0)
    path = folder / "mtp.safetensors"
    head = dict(mx.load(str(path)))
    head = {n: v if "norm" in n else mx.random.normal(v.shape, key=mx.random.key(3)) * 0.1 for n, v in head.items()}
    mx.eval(head)
    mx.save_safetensors(str(path), head, {"format": "mlx"})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_right(load_head(folder, load_model(folder)), folder)


def test_a_sure_head_costs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafting, "_continuation", lambda *_: pytest.fail("the model was asked"))
    load(folder, mtp=True)
    load(mtp=True)


def test_a_streamed_model_is_asked_only_if_it_has_to_be(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite(folder, "mtp.safetensors", -1)
    plan = StreamPlan(slots=(6,) * 8, group=2, chunk=64, tile=64, cache_limit=1 << 24, memory=1 << 30)
    model = load_model(folder, stream=plan)
    asked = []
    monkeypatch.setattr(drafting, "_continuation", lambda model, count, real=drafting._continuation: (
        asked.append(count), real(model, count))[1])  # fmt: skip
    assert_right(load_head(folder, model), folder)
    assert asked == []
    monkeypatch.setattr(norms, "written", lambda entries: None)
    with pytest.warns(Qwen35Warning):
        assert_right(load_head(folder, model), folder)
    assert asked == [12]
    model.unload()


def test_a_drafter_too(folder: Path, tmp_path: Path) -> None:
    """A folder of mlx-vlm's kind, with norms as they were trained."""
    head = dict(mx.load(str(folder / PLACE)))
    head = {n.removeprefix("mtp."): v.astype(mx.float32) - 1 if "norm" in n else v for n, v in head.items()}
    mx.eval(head)
    (tmp_path / "d").mkdir()
    mx.save_safetensors(str(tmp_path / "d/model.safetensors"), head, {"format": "mlx"})
    text = json.loads((folder / "config.json").read_text())["text_config"]
    (tmp_path / "d/config.json").write_text(json.dumps({"model_type": "qwen3_5_mtp", "text_config": text}))
    with pytest.warns(Qwen35Warning, match="read as zero-centred, though their writer"):
        assert_right(load_draft_model(tmp_path / "d", load_model(folder)), folder)
