"""The command line, called in this process."""

import io
from types import SimpleNamespace

import pytest

from mlx_qwen35.cli.main import main
from tests.speakers import checkpoint, encoded, seeing, speak  # noqa: F401


@pytest.fixture
def run(capsys, monkeypatch):
    """run("generate", ..., stdin="text") -> status, out, err"""

    def run(*argv: str, stdin: str = "") -> SimpleNamespace:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin.encode()), encoding="utf-8"))
        capsys.readouterr()
        status = main([str(argument) for argument in argv])
        out, err = capsys.readouterr()
        return SimpleNamespace(status=status, out=out, err=err)

    return run
