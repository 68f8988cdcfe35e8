"""No module knows itself by way of others: imports make no circle, those inside functions and those for types included.

Two modules that name each other's types cannot be read one without the other, even where one import is for type
checkers alone; so all imports count.
"""

from __future__ import annotations

import pytest

grimp = pytest.importorskip("grimp", reason="import-linter is not installed (extra 'test')")


def circles(graph: grimp.ImportGraph) -> list[set[str]]:
    """Sets of modules each of which imports all of its set, directly or by others."""
    found: list[set[str]] = []
    for module in sorted(graph.modules):
        others = graph.find_upstream_modules(module) & graph.find_downstream_modules(module)
        if others and not any(module in circle for circle in found):
            found.append({module, *others})
    return found


@pytest.mark.parametrize("types_too", [False, True])
def test_no_circle(types_too: bool) -> None:
    graph = grimp.build_graph("mlx_qwen35", exclude_type_checking_imports=not types_too, cache_dir=None)
    assert len(graph.modules) > 300
    assert not circles(graph)


def test_circles_are_found() -> None:
    graph = grimp.ImportGraph()
    for importer, imported in (("a", "b"), ("b", "c"), ("c", "a"), ("c", "d"), ("e", "f"), ("f", "e")):
        graph.add_import(importer=importer, imported=imported)
    assert circles(graph) == [{"a", "b", "c"}, {"e", "f"}]
