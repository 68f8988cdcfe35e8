"""What convert() writes from every source: its values, a folder as it is laid down, and equal logits in every loader.

The cells are in matrix.py, which runs the whole product as a program.
"""

from pathlib import Path

import pytest

from tests.peers import matrix
from tests.peers.sources import SOURCES, Shelf


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    return Shelf(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module", autouse=True)
def peers() -> None:
    """Said once: without a peer the cells still hold the files and this package's answers against the source."""
    missing = [name for name in ("mlx-lm", "mlx-vlm") if name not in matrix.LOADERS]
    if missing:
        print(f"{' and '.join(missing)} not installed: the matrix runs without")


@pytest.mark.parametrize("source, target", matrix.some_pairs())
def test_cell(shelf: Shelf, tmp_path: Path, source: str, target: str) -> None:
    matrix.check(shelf[source], matrix.TARGETS[target], tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_the_part_of_the_product() -> None:
    cells = matrix.some_pairs()
    for at, all_of_them, least in ((0, SOURCES, 6), (1, matrix.TARGETS, 4)):
        met = [cell[at] for cell in cells]
        assert all(met.count(name) >= least for name in all_of_them)
