"""Do the tests notice faults? Plants some, one at a time, and runs the tests that can see the place.

    python tools/mutants.py                        # 20 faults, spread over all rooms
    python tools/mutants.py --count 300 --seed 1 --room engine --room session

Each mutant changes one operator, number, condition or statement of one file of the package, in a copy of the checkout.
Tests are tried in the order of their nearness: those whose files import the module itself, then those that import what
imports it, at most --files of them. The first that fails, and does not fail without the change, kills it. What
survives is printed with the line as it was and as it is: a fault that no test sees, or a change without consequence.
Writes a line of JSON a mutant to --report. Knows Python's syntax tree, and nothing of the model. Why not mutmut or
cosmic-ray: the one forks a process, which MLX's threads do not survive, the other runs one command for every mutant.
"""

from __future__ import annotations

import argparse
import ast
import copy
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "mlx_qwen35"
_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Add,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.LShift: ast.RShift, ast.RShift: ast.LShift,
}  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change. before, after: the first line of what changes."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    text: str  # of the whole file


@dataclass
class Outcome:
    """What became of a mutant. by: the test file that failed; None: nothing did."""

    file: str
    line: int
    kind: str
    before: str
    after: str
    verdict: str  # killed, survived, unseen (no test imports it)
    by: str | None
    tried: list[str]
    seconds: float


def places(tree: ast.Module) -> Iterator[tuple[ast.AST, str, Callable[[ast.AST], ast.AST | None]]]:
    """(node, kind, change) of all that may be changed; the change is made to a copy of the node, in place of it."""
    skipped: set[int] = set()
    for node in ast.walk(tree):  # parents come before their children
        if id(node) in skipped:
            skipped |= {id(child) for child in ast.iter_child_nodes(node)}
            continue
        skipped |= {id(child) for child in _not_run(node)}
        if isinstance(node, ast.BinOp | ast.AugAssign) and type(node.op) in _SWAPPED:
            yield node, "operator", _with_op
        elif isinstance(node, ast.BoolOp):
            yield node, "and, or", _with_op
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPPED:
            yield node, "comparison", _with_first_op
        elif isinstance(node, ast.If | ast.While | ast.IfExp):
            yield node, "condition", _negated
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
            yield node, "number", _other_constant
        elif isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            yield node, "result", lambda new: _set(new, "value", ast.Constant(None))
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            yield node, "call left out", lambda new: ast.Pass()
        elif isinstance(node, ast.Assign | ast.AugAssign) and isinstance(_target(node), ast.Attribute):
            yield node, "assignment left out", lambda new: ast.Pass()


def _not_run(node: ast.AST) -> Iterator[ast.AST]:
    """Children whose change is no fault: annotations, decorators, texts of errors, imports for types."""
    if isinstance(node, ast.ClassDef):
        yield from node.decorator_list
    elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        yield from [*node.decorator_list, *filter(None, [node.returns])]
    elif isinstance(node, ast.keyword) and node.arg in ("strict", "total"):  # of zip and TypedDict: for readers
        yield node.value
    elif isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None:
        yield node.annotation
    elif isinstance(node, ast.Raise | ast.JoinedStr | ast.Assert):
        yield from ast.iter_child_nodes(node)
    elif isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
        yield from [node.test, *node.body]
    elif isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id[:1].isupper():
        yield node.slice  # Sequence[int]


def _target(node: ast.Assign | ast.AugAssign) -> ast.AST:
    return node.targets[0] if isinstance(node, ast.Assign) else node.target


def _is_none(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value is None


def _set(node: ast.AST, name: str, value: object) -> ast.AST:
    setattr(node, name, value)
    return node


def _with_op(node: ast.AST) -> ast.AST:
    return _set(node, "op", _SWAPPED[type(node.op)]())  # type: ignore[attr-defined]


def _with_first_op(node: ast.AST) -> ast.AST:
    return _set(node, "ops", [_SWAPPED[type(node.ops[0])](), *node.ops[1:]])  # type: ignore[attr-defined]


def _negated(node: ast.AST) -> ast.AST | None:
    test = node.test  # type: ignore[attr-defined]
    if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
        return None
    return _set(node, "test", ast.UnaryOp(ast.Not(), test))


def _other_constant(node: ast.AST) -> ast.AST:
    value = node.value  # type: ignore[attr-defined]
    other = value + 1 if type(value) is int else value * 2 or 1.0
    return _set(node, "value", not value if isinstance(value, bool) else other)


def mutant(path: Path, number: int) -> Mutant | None:
    """The file with a change at one of its places; None where that is no program."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    node, kind, change = list(places(ast.parse(source)))[number]
    if (new := change(copy.deepcopy(node))) is None:
        return None
    text = _spliced(lines, node, ast.unparse(ast.fix_missing_locations(new)))
    try:
        ast.parse(text)
    except SyntaxError:  # a generator without its brackets, say
        return None
    line = node.lineno  # type: ignore[attr-defined]
    before, after = lines[line - 1].strip(), text.splitlines()[line - 1].strip()
    return Mutant(path.relative_to(ROOT).as_posix(), line, kind, before, after, text)


def _spliced(lines: Sequence[str], node: ast.AST, new: str) -> str:
    """The text with a node's part of it replaced; offsets are those of bytes."""
    first, last = node.lineno - 1, node.end_lineno - 1  # type: ignore[attr-defined]
    head = lines[first].encode()[: node.col_offset].decode()  # type: ignore[attr-defined]
    tail = lines[last].encode()[node.end_col_offset :].decode()  # type: ignore[attr-defined]
    if isinstance(node, ast.stmt):
        new = new.replace("\n", "\n" + " " * node.col_offset)
    else:
        new = f"({' '.join(new.split(chr(10)))})"
    return "\n".join([*lines[:first], head + new + tail, *lines[last + 1 :]]) + "\n"


def imports(path: Path, names: Mapping[str, Path]) -> set[str]:
    """The modules among `names` that a file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(path, node)
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
            if base == PACKAGE:
                found |= {_HOMES[alias.name] for alias in node.names if alias.name in _HOMES}
    return found & names.keys()


def _absolute(path: Path, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = path.relative_to(ROOT).parent.parts
    return ".".join([*package[: len(package) - node.level + 1], *filter(None, [node.module])])


def _module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _homes() -> dict[str, str]:
    stub = (ROOT / PACKAGE / "__init__.pyi").read_text(encoding="utf-8").splitlines()
    return {words[3]: words[1] for line in stub if (words := line.split())[:1] == ["from"]}


_HOMES = _homes()


class Nearness:
    """Which test files see a module, the nearest first."""

    def __init__(self) -> None:
        sources = {_module(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}
        helpers = {_module(path): path for path in sorted((ROOT / "tests").rglob("*.py"))}
        self._users: dict[str, set[str]] = defaultdict(set)
        self._uses: dict[str, int] = {}
        everything = sources | helpers
        for module, path in everything.items():
            used_here = imports(path, everything)
            self._uses[module] = len(used_here)
            for used in used_here:
                self._users[used].add(module)
        self._tests = {module: path for module, path in helpers.items() if path.name.startswith("test_")}

    def tests(self, module: str) -> list[str]:
        """Test files: first those of its name, then by how many imports lie between, then those of its room, then those
        that use little else."""
        room, name = module.split(".")[1:2], module.rpartition(".")[2]
        distance, queue = {module: 0}, deque([module])
        while queue:
            at = queue.popleft()
            for user in self._users[at]:
                if user not in distance:
                    distance[user] = distance[at] + 1
                    queue.append(user)
        found = [test for test in self._tests if test in distance]

        def far(test: str) -> tuple[bool, int, bool, int, str]:
            its_own = test.endswith(f".test_{name}")
            return not its_own, distance[test], not set(room) & set(test.split(".")), self._uses[test], test

        return [self._tests[test].relative_to(ROOT).as_posix() for test in sorted(found, key=far)]


def chosen(rooms: Sequence[str], count: int, seed: int) -> list[Mutant]:
    """So many mutants, the rooms in turn, of each the same ones for a seed."""
    draw = random.Random(seed)
    by_room: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        inner = path.relative_to(ROOT / PACKAGE).parts
        by_room[inner[0].removesuffix(".py")].append(path)
    if unknown := set(rooms) - by_room.keys():
        raise SystemExit(f"no room {', '.join(sorted(unknown))}; there are {', '.join(by_room)}")
    pools: dict[str, list[tuple[Path, int]]] = {}
    for room in draw.sample(sorted(rooms or by_room), len(rooms or by_room)):
        numbers = ((path, len(list(places(ast.parse(path.read_text(encoding="utf-8")))))) for path in by_room[room])
        pools[room] = [(path, number) for path, most in numbers for number in range(most)]
        draw.shuffle(pools[room])
    found: list[Mutant] = []
    while len(found) < count and any(pools.values()):
        for pool in pools.values():
            if pool and len(found) < count and (made := mutant(*pool.pop())):
                found.append(made)
    return found


class Trials:
    """Tests over mutants, in a copy of the checkout. seconds: that a test file may take; more counts as failed."""

    def __init__(self, copy_of: Path, seconds: float) -> None:
        self._copy, self._seconds = copy_of, seconds
        self._sound: dict[str, bool] = {}  # test files that were run without any change, and whether they passed

    def of(self, mutant: Mutant, tests: Sequence[str]) -> Outcome:
        """File by file, until one fails that passes without the change."""
        begun, run, by = time.monotonic(), [], None
        for test in tests:
            if self._sound.get(test, True):
                run.append(test)
                if not self._passes(test, mutant) and self._is_sound(test):
                    by = test
                    break
        verdict = "killed" if by else "survived" if run else "unseen"
        said = {name: value for name, value in asdict(mutant).items() if name != "text"}
        return Outcome(**said, verdict=verdict, by=by, tried=run, seconds=round(time.monotonic() - begun, 1))

    def _is_sound(self, test: str) -> bool:
        if test not in self._sound:
            self._sound[test] = self._passes(test)
        return self._sound[test]

    def _passes(self, test: str, mutant: Mutant | None = None) -> bool:
        words = ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", "--tb=no", test]
        environment = {**os.environ, "PYTHONPATH": str(self._copy), "OPENBLAS_NUM_THREADS": "1"}
        environment["PYTHONDONTWRITEBYTECODE"] = "1"  # a file that changes twice in a second looks the same by its date
        path = self._copy / (mutant.file if mutant else test)
        whole = path.read_text(encoding="utf-8")
        try:
            if mutant:
                path.write_text(mutant.text, encoding="utf-8")
            done = subprocess.run(
                [sys.executable, *words], cwd=self._copy, env=environment, capture_output=True, timeout=self._seconds
            )
            return done.returncode in (0, 5)  # 5: all were skipped
        except subprocess.TimeoutExpired:
            return False
        finally:
            path.write_text(whole, encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Plant faults in the package, and see whether the tests notice.")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="how many (default: 20)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="which ones (default: 0)")
    parser.add_argument("--room", action="append", default=[], metavar="NAME", help="only there: engine, cache, ...")
    parser.add_argument("--files", type=int, default=6, metavar="N", help="test files for each, at most (default: 6)")
    parser.add_argument("--seconds", type=float, default=600, metavar="S", help="for a test file (default: 600)")
    parser.add_argument("--report", type=Path, default=None, metavar="FILE", help="a line of JSON for each, appended")
    parser.add_argument("--list", action="store_true", help="print them and the tests, and run nothing")
    args = parser.parse_args()
    nearness, wanted = Nearness(), chosen(args.room, args.count, args.seed)
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        copy_of = Path(folder) / "checkout"
        trials = Trials(copy_of, args.seconds)
        if not args.list:
            shutil.copytree(ROOT, copy_of, symlinks=True, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        for number, each in enumerate(wanted, 1):
            tests = nearness.tests(_module(ROOT / each.file))[: args.files]
            print(f"{number}/{len(wanted)} {each.file}:{each.line}, {each.kind}", flush=True)
            if args.list:
                print(f"  - {each.before}\n  + {each.after}\n  {' '.join(tests) or 'no test sees it'}")
                continue
            outcome = trials.of(each, tests)
            counts[outcome.verdict] += 1
            by = f" by {outcome.by}" if outcome.by else ""
            print(f"  {outcome.verdict} in {outcome.seconds} s{by}", flush=True)
            if outcome.by is None:
                print(f"  - {each.before}\n  + {each.after}\n  tried: {' '.join(outcome.tried) or 'nothing'}")
            if args.report is not None:
                with args.report.open("a", encoding="utf-8") as report:
                    report.write(json.dumps(asdict(outcome)) + "\n")
    if counts:
        print(", ".join(f"{count} {verdict}" for verdict, count in sorted(counts.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
