"""The pages of docs/ name what there is: commands that can be read, programs with their flags, files, links.

Those of README and docs/GUIDE.md are run (test_readme.py); these are about models and machines that no test has.
"""

import ast
import inspect
import re
import shlex
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from textwrap import dedent

import pytest

import mlx_qwen35
from mlx_qwen35.cli.main import build_parser
from tests.conftest import CHECKOUT
from tests.test_readme import FENCED, INDENTED, PAGES, commands

DOCS = sorted(page for page in [*(CHECKOUT / "docs").glob("*.md"), CHECKOUT / "benchmarks/METHODOLOGY.md"])
OTHERS = [page for page in DOCS if page not in PAGES]
each = pytest.mark.parametrize("page", OTHERS, ids=lambda page: page.name)
FLAG = re.compile(r"--[a-z][\w-]+")


def unread(command: str) -> str | None:
    """What is wrong with a command; None: nothing that can be seen without running it."""
    words = shlex.split(command, comments=True)
    if words[:2] in (["python", "convert.py"], ["python", "generate.py"]):
        words = ["mlx-qwen35", words[1].removesuffix(".py"), *words[2:]]
    if words[0] == "mlx-qwen35":
        if len(words) < 2 or words[1].startswith("--"):
            return None
        for more in ([], ["1"]):  # the value of a flag at the end, which is only named
            with suppress(SystemExit):
                build_parser().parse_args([*words[1:], *more])
                return None
        return "it is no command of this program"
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (CHECKOUT / "Makefile").read_text(), re.MULTILINE)
        return None if words[1] in targets else "make has no such target"
    if words[0] != "python" or words[1] == "-c":
        return None
    if words[1] == "-m":
        file, flags = CHECKOUT / f"{words[2].replace('.', '/')}.py", words[3:]
        if words[2].partition(".")[0] not in ("tests", "benchmarks", "tools"):
            return None  # another's
    else:
        file, flags = CHECKOUT / words[1], words[2:]
    if not file.exists():
        return f"{file.relative_to(CHECKOUT)} is not there"
    source = file.read_text()
    return next((f"it has no {flag}" for flag in flags if FLAG.fullmatch(flag) and f'"{flag}"' not in source), None)


@each
def test_commands_can_be_read(page: Path) -> None:
    wrong = {command: fault for command in commands(page.read_text()) if (fault := unread(command))}
    assert not wrong


def test_commands_are_found() -> None:
    found = [command for page in OTHERS for command in commands(page.read_text())]
    assert len(found) > 40 and sum(command.startswith("mlx-qwen35 ") for command in found) > 10
    assert unread("mlx-qwen35 chat --nonsense") and unread("python benchmarks/launches.py --nonsense")
    assert unread("make nonsense") and unread("python benchmarks/nonsense.py")


@each
def test_snippets_call_what_there_is(page: Path) -> None:
    """They are Python, and public names are imported and called with arguments that they have."""
    for code in [*FENCED.findall(page.read_text()), *blocks_of_python(page.read_text())]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mlx_qwen35"):
                module = import_module(node.module or "")
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)], code
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
                continue
            if node.func.id in mlx_qwen35.__all__ and not any(isinstance(each, ast.Starred) for each in node.args):
                signature = inspect.signature(getattr(mlx_qwen35, node.func.id))
                signature.bind_partial(*node.args, **{word.arg: None for word in node.keywords if word.arg})


def blocks_of_python(text: str) -> list[str]:
    """Indented blocks that begin with an import."""
    return [block for part in INDENTED.findall(text) if (block := dedent(part)).startswith(("from ", "import "))]


@each
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    assert not [link for link in links if "://" not in link and not (page.parent / link).exists()]


def test_rows_are_those_that_are_held() -> None:
    """MODEL.md has each row of pyproject.toml, and ARCHITECTURE.md no file that is not there."""
    rows = re.search(r"^layers = \[\n(.*?)^\]", (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE | re.DOTALL)
    assert rows
    modules = re.findall(r"\w+", rows[1])
    table = (CHECKOUT / "docs/MODEL.md").read_text()
    assert len(modules) > 20
    assert not [name for name in modules if f"`{name}.py`" not in table and f"`{name}/`" not in table]
    words = re.findall(r"(?<![\w./*-])[\w/]+(?:\.pyi?|/)(?![\w/])", (CHECKOUT / "docs/ARCHITECTURE.md").read_text())
    assert len(words) > 60
    package = CHECKOUT / "mlx_qwen35"
    assert not [word for word in words if not (CHECKOUT / word).exists() and not any(package.rglob(word.rstrip("/")))]
