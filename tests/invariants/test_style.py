"""The house rules a program can check: ruff, length, docstrings, types, and nothing that belongs to one machine."""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import CHECKOUT

LONGEST = 500
SOURCES = sorted((CHECKOUT / "mlx_qwen35").rglob("*.py"))
# A path that exists on one machine only. Written so that it does not match itself.
ONE_MACHINE = re.compile(r"(?<![\w.~-])/(?:work|root|farm|home|Users)/\w")


def tracked_files() -> list[Path]:
    if not shutil.which("git") or not (CHECKOUT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the project is not known")
    names = subprocess.run(["git", "ls-files", "-z"], cwd=CHECKOUT, capture_output=True, check=True).stdout
    return [path for name in names.decode().split("\0") if name and (path := CHECKOUT / name).is_file()]


def test_ruff() -> None:
    pytest.importorskip("ruff", reason="ruff is not installed (extra 'test')")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=CHECKOUT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_path_of_one_machine() -> None:
    found = []
    for path in tracked_files():
        try:
            lines = path.read_text().splitlines()
        except UnicodeDecodeError:
            continue
        found += [f"{path.name}:{n}: {line}" for n, line in enumerate(lines, 1) if ONE_MACHINE.search(line)]
    assert not found, "\n".join(found)


def test_files_are_short() -> None:
    lengths = {path.name: len(path.read_text().splitlines()) for path in tracked_files() if path.suffix == ".py"}
    long = {name: lines for name, lines in lengths.items() if lines > LONGEST}
    assert not long, f"more than {LONGEST} lines usually hide a second noun: {long}"


def test_each_module_opens_with_what_it_knows() -> None:
    """And with what it does not."""
    texts = {path: path.read_text() for path in SOURCES}
    silent = [place(path) for path, text in texts.items() if text and not ast.get_docstring(ast.parse(text))]
    assert len(texts) > 200 and not silent


def place(path: Path) -> str:
    return path.relative_to(CHECKOUT).as_posix()


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Functions and methods that can be reached by public names; those inside functions are nobody's business."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if not node.name.startswith("_") or node.name in ("__init__", "__call__"):
                yield node


def test_public_functions_are_typed() -> None:
    untyped, count = [], 0
    for path in SOURCES:
        for function in functions(ast.parse(path.read_text())):
            spec, count = function.args, count + 1
            arguments = [*spec.posonlyargs, *spec.args, *spec.kwonlyargs, *filter(None, (spec.vararg, spec.kwarg))]
            bare = [a.arg for a in arguments if a.annotation is None and a.arg not in ("self", "cls")]
            if bare or (function.returns is None and function.name != "__init__"):
                untyped.append(f"{place(path)}:{function.lineno} {function.name}({', '.join(bare)})")
    assert count > 1000 and not untyped, "\n".join(untyped)


def test_commits_that_are_named_are_in_the_history() -> None:
    """A figure names the commit that it was measured at: it must be there to go back to."""
    named = {
        (path.name, word)
        for path in tracked_files()
        if path.suffix == ".md"
        for word in re.findall(r"\b(?=[0-9a-f]*[a-f])(?=[0-9a-f]*[0-9])[0-9a-f]{7}\b", path.read_text())
    }
    shallow, known = (
        subprocess.run(["git", *words], cwd=CHECKOUT, capture_output=True, text=True).stdout.split()
        for words in (["rev-parse", "--is-shallow-repository"], ["log", "--format=%h", "--abbrev=7"])
    )
    if shallow != ["false"]:
        pytest.skip("a shallow clone has no history to look into")
    assert not [f"{file}: {word}" for file, word in sorted(named) if word not in known]
