"""examples/quickstart.ipynb runs from top to bottom, on the demo."""

import json
from typing import Any

import pytest

from tests.conftest import CHECKOUT

NOTEBOOK = CHECKOUT / "examples" / "quickstart.ipynb"


def code_cells() -> list[str]:
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


def test_it_is_stored_without_outputs() -> None:
    """They would be those of one machine, and old."""
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert all(cell.get("outputs", []) == [] and cell.get("execution_count") is None for cell in cells)


@pytest.mark.soak
def test_in_python(capsys: pytest.CaptureFixture[str]) -> None:
    """IPython is optional: every cell is plain Python."""
    space: dict[str, Any] = {"__name__": "quickstart"}
    for number, cell in enumerate(code_cells()):
        exec(compile(cell, f"cell {number}", "exec"), space)
    assert capsys.readouterr().out.strip()
    reply = space["helper"].last
    assert reply.finish_reason == "stop" and reply.text
    assert [message["role"] for message in space["helper"].history] == ["user", "assistant", "tool", "assistant"]
    assert space["chat"].last.media[0].kind == "video"


def test_in_a_kernel() -> None:
    """As Jupyter runs it: answers are drawn, and once each."""
    nbformat = pytest.importorskip("nbformat", reason="nbformat and nbclient are not installed")
    nbclient = pytest.importorskip("nbclient", reason="nbformat and nbclient are not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(CHECKOUT)}}).execute()
    sent = [cell for cell in notebook.cells if ".send(" in cell.source and "chat" in cell.source]
    for cell in sent:
        drawn = [out for out in cell.outputs if "text/markdown" in out.get("data", {})]
        assert "<table>" in drawn[-1].data["text/markdown"]
        assert len(drawn) == (2 if "images=" in cell.source or "videos=" in cell.source else 1)
    loading = notebook.cells[1].outputs[0].data
    assert loading["text/html"].startswith("<progress ") and "Loading: " in loading["text/plain"]
