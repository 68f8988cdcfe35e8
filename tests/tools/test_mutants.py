"""The planter of faults: what it changes, which tests it asks, and what it says of them."""

import ast
from pathlib import Path

import pytest

from tools import mutants

SOURCE = '''\
"""Words with 1 in them."""
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Size:
    width: int = 3


def area(size: Size, rows: "Sequence[int]" = (2,)) -> int:
    if size.width < 0 and rows:
        raise ValueError(f"width is {size.width + 1}")
    size.seen = True
    rows.append(size.width * rows[0])
    return (
        len(rows)
        - 1
    )
'''


def changed(source: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[mutants.Mutant]:
    monkeypatch.setattr(mutants, "ROOT", folder)
    path = folder / "area.py"
    path.write_text(source)
    numbers = range(len(list(mutants.places(ast.parse(source)))))
    return [made for number in numbers if (made := mutants.mutant(path, number))]


def test_what_is_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = changed(SOURCE, tmp_path, monkeypatch)
    kinds = {(mutant.line, mutant.kind) for mutant in made}
    assert kinds == {
        (11, "number"), (14, "number"), (15, "condition"), (15, "and, or"), (15, "comparison"), (15, "number"),
        (17, "assignment left out"), (17, "number"), (18, "call left out"), (18, "operator"), (18, "number"),
        (19, "result"), (20, "operator"), (21, "number"),
    }  # fmt: skip
    for mutant in made:  # each is a program, and another than before
        assert ast.dump(ast.parse(mutant.text)) != ast.dump(ast.parse(SOURCE)), mutant
    assert any("size.width <= 0" in mutant.text for mutant in made)


def test_which_tests_are_asked() -> None:
    nearness = mutants.Nearness()
    assert nearness.tests("mlx_qwen35.sampling.largest")[0] == "tests/sampling/test_largest.py"
    assert nearness.tests("mlx_qwen35.engine.scheduler")[0] == "tests/engine/test_scheduler.py"
    assert "tests/test_generation.py" in nearness.tests("mlx_qwen35.engine.asked")  # by way of others


def test_drawn_alike_for_a_seed_and_from_all_rooms() -> None:
    drawn = mutants.chosen(["checks", "sampling", "grammar"], 6, seed=3)
    assert drawn == mutants.chosen(["checks", "sampling", "grammar"], 6, seed=3) != mutants.chosen(["grammar"], 6, 3)
    assert sum("grammar/" in mutant.file for mutant in drawn) == 2
    with pytest.raises(SystemExit, match="no room nonsense"):
        mutants.chosen(["nonsense"], 1, seed=0)


def test_what_is_said_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = changed("def double(x):\n    y = 1 + x\n    return x * 2\n", tmp_path, monkeypatch)
    (tmp_path / "test_area.py").write_text("from area import double\ndef test(): assert double(3) == 6\n")
    (tmp_path / "test_red.py").write_text("def test(): assert False\n")  # which says nothing of mutants
    trials, verdicts = mutants.Trials(tmp_path, 60), {}
    for mutant in made:
        outcome = trials.of(mutant, ["test_red.py", "test_area.py"])
        assert outcome.by in (None, "test_area.py")
        verdicts[mutant.line, mutant.kind] = outcome.verdict
    assert verdicts == {
        (2, "operator"): "survived", (2, "number"): "survived",
        (3, "result"): "killed", (3, "operator"): "killed", (3, "number"): "killed",
    }  # fmt: skip
    assert (tmp_path / "area.py").read_text().endswith("x * 2\n")
    assert trials.of(made[0], []).verdict == "unseen"
