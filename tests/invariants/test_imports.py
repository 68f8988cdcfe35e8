"""What importing the package brings along, and which way its modules import each other."""

import ast
import subprocess
import sys

import pytest

import mlx_qwen35
from tests.conftest import CHECKOUT

HEAVY = ("transformers", "mlx_lm", "torch", "tokenizers", "jinja2", "huggingface_hub", "PIL", "IPython")


def run(*arguments: str) -> str:
    done = subprocess.run([sys.executable, *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "statement",
    ["import mlx_qwen35", "from mlx_qwen35 import *", "import mlx_qwen35.cli.main"],
)
def test_import_is_light(statement: str) -> None:
    loaded = run("-c", f"{statement}; import sys; print(*sys.modules)").split()
    assert "mlx_qwen35" in loaded
    assert not set(HEAVY) & set(loaded)


def test_bare_import_leaves_mlx_alone() -> None:
    assert "mlx.core" not in run("-c", "import mlx_qwen35, sys; print(*sys.modules)").split()


def test_public_names() -> None:
    """Each is where the stub says, which names nothing else; `import *` and `dir` have them all."""
    tree = ast.parse((CHECKOUT / "mlx_qwen35/__init__.pyi").read_text())
    typed = {
        (alias.name, alias.asname, node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert len(typed) > 30
    assert typed == {(name, name, module) for name, module in mlx_qwen35._modules().items()}
    assert mlx_qwen35.__all__ == sorted(name for name, _, _ in typed)
    assert set(mlx_qwen35.__all__) <= set(dir(mlx_qwen35))
    for name in mlx_qwen35.__all__:
        assert getattr(mlx_qwen35, name).__name__ == name


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = mlx_qwen35.nonsense


def test_rows() -> None:
    """import-linter, with the rows that pyproject.toml lays down."""
    pytest.importorskip("importlinter", reason="import-linter is not installed (extra 'test')")
    run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()")
