"""Arguments of what is not an answer: one of this package's errors for each value that means nothing, before work."""

from pathlib import Path

import pytest

from mlx_qwen35 import (
    Chat,
    Session,
    convert,
    estimate,
    list_models,
    load,
    load_draft_model,
    load_model,
    load_processor,
    load_session,
)
from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.library import demo_folder
from tests.engine.test_allowed import MODEL, PROCESSOR

WRONG = {
    "load, mtp": (lambda: load(mtp="yes"), "mtp is 'yes', of type str; give True or False"),
    "load, yarn": (lambda: load(yarn="no", context_length=9), "yarn is 'no'"),
    "load, warm_start": (lambda: load(warm_start=5), "warm_start is 5"),
    "load, on_progress": (lambda: load(on_progress=5), "on_progress is 5, of type int; give a function"),
    "load, adapter_path": (lambda: load(adapter_path=5), "adapter_path is 5, of type int; give a text or a Path"),
    "load, no adapter_path": (lambda: load(adapter_path=""), "adapter_path is ''"),
    "load_model": (lambda: load_model(5), "folder is 5"),
    "load_model, yarn": (lambda: load_model(demo_folder(), yarn=1), "yarn is 1"),
    "load_processor": (lambda: load_processor(yarn="x"), "yarn is 'x'"),
    "load_draft_model": (lambda: load_draft_model("demo", PROCESSOR), "give the model that it drafts for"),
    "load_draft_model, a pair": (lambda: load_draft_model("demo", (MODEL, PROCESSOR)), "load gives two"),
    "estimate, mtp": (lambda: estimate(mtp="x"), "mtp is 'x'"),
    "estimate, probe": (lambda: estimate(probe=1), "probe is 1"),
    "list_models": (lambda: list_models(["here"]), r"a folder is \['here'\], of type list; give a text or a Path"),
    "Session": (lambda: Session(PROCESSOR), "the model comes first"),
    "Session, a name": (lambda: Session("demo"), "model is 'demo', of type str; give the model that load returns"),
    "Session, processor": (lambda: Session(MODEL, "x"), "processor is 'x'"),
    "Session, snapshot_bytes": (lambda: Session(MODEL, snapshot_bytes=-1), "snapshot_bytes is -1"),
    "load_session": (lambda: load_session(5, MODEL), "path is 5"),
    "load_session, swapped": (lambda: load_session("x", PROCESSOR, MODEL), "the model comes first"),
    "save": (lambda: Chat(MODEL, PROCESSOR, display="off").save(5), "path is 5"),
    "save, nowhere": (lambda: Chat(MODEL, PROCESSOR, display="off").save(""), "path is ''"),
    "load a chat": (lambda: Chat(MODEL, PROCESSOR, display="off").load(5), "path is 5"),
    "convert, verify": (lambda: convert("demo", "x", verify="x"), "verify is 'x'"),
    "convert, adapter_path": (lambda: convert("demo", "x", adapter_path=5), "adapter_path is 5"),
    "convert, mlx-lm's": (lambda: convert("demo", "x", quant_predicate="x"), "did you mean recipe"),
}


@pytest.mark.parametrize("what", WRONG)
def test_a_value_that_means_nothing(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mlx_qwen35.checkpoint.files.read", lambda *a, **k: pytest.fail("a weight is read"))
    call, says = WRONG[what]
    with pytest.raises(ArgumentError, match=says) as refused:
        call()
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())
