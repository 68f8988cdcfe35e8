"""The public face in a type checker's strict mode: right.py has no fault, and wrong.py has those that it says.

Knows pyright's report, as basedpyright gives it, whose wheel brings all that it needs. Reads both files in one run.
"""

import inspect
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from mlx_qwen35 import generate_batch, serve, stream_generate
from mlx_qwen35.conversion import convert as conversion
from mlx_qwen35.engine.allowed import PromptOptions
from mlx_qwen35.engine.asked import Computed, Course, Drafters, Form
from mlx_qwen35.engine.options import ChatOptions, StreamOptions, SubmitOptions, names_of
from mlx_qwen35.library.converting import ConvertOptions
from mlx_qwen35.serving.loaded import Loading, LoadingOptions

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def faults() -> Counter[tuple[str, int]]:
    """How many were found in each line of a file."""
    pytest.importorskip("basedpyright", reason="basedpyright is not installed (extra 'test')")
    command = [sys.executable, "-m", "basedpyright", "-p", str(HERE), "--pythonpath", sys.executable, "--outputjson"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    report = json.loads(done.stdout)
    assert report["summary"]["filesAnalyzed"] == 2, done.stdout
    found = [
        (Path(fault["file"]).name, fault["range"]["start"]["line"] + 1, fault["message"])
        for fault in report["generalDiagnostics"]
    ]
    print(*(f"{file}:{line}: {message}" for file, line, message in found), sep="\n")
    return Counter((file, line) for file, line, _ in found)


def test_what_is_right_has_no_fault(faults: Counter[tuple[str, int]]) -> None:
    assert not [line for line in faults if line[0] == "right.py"]


def test_each_mistake_is_found(faults: Counter[tuple[str, int]]) -> None:
    lines = (HERE / "wrong.py").read_text().splitlines()
    wrong = {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}
    assert len(wrong) > 15 and {line for file, line in faults if file == "wrong.py"} == wrong


def by_name(function: Callable[..., Any]) -> dict[str, str]:
    """What it takes by name only, and the types."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each.annotation for each in parameters if each.kind is each.KEYWORD_ONLY}


def test_options_are_those_of_stream_generate() -> None:
    """By name and by type, in the table of options and in the groups that are handed on."""
    explained = by_name(stream_generate)
    assert {name: kind.__forward_arg__ for name, kind in StreamOptions.__annotations__.items()} == explained
    assert set(names_of(SubmitOptions)) - {"priority"} < set(explained) > set(names_of(ChatOptions))
    assert set(by_name(generate_batch)) - {"most_rows"} < set(explained)
    groups = [set(group.__dataclass_fields__) for group in (PromptOptions, Form, Course, Computed, Drafters)]
    assert sum(map(len, groups)) == len(set.union(*groups))  # each has one place
    assert set.union(*groups) | {"images", "videos", "sampling"} == {*explained, "priority"}


def test_options_that_are_handed_on_are_those_there() -> None:
    """To a conversion, and to the loading of a server's models."""
    assert {*names_of(ConvertOptions), "on_progress"} == set(by_name(conversion.convert))
    assert {*names_of(LoadingOptions)} == {field.name for field in fields(Loading)} - set(by_name(serve))
