"""Which values are no numbers: every bit pattern of 16 bits, and those of float32 around the borders. And how large the
pieces of a tensor are."""

from pathlib import Path

import numpy as np
import pytest

from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors
from mlx_qwen35.checkpoint.source import open_source
from mlx_qwen35.config import QuantSpec
from mlx_qwen35.conversion import task
from mlx_qwen35.conversion.plan import make_plan
from mlx_qwen35.conversion.recipes import fitted
from mlx_qwen35.conversion.task import first_odd
from tests.checkpoint.published import FORMS, write

EXPONENTS = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}


def patterns(tag: str) -> np.ndarray:
    if tag != "F32":
        return np.arange(1 << 16, dtype=np.uint16)
    borders = [0, 1, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000, 0x7FFFFFFF]
    return np.array([sign | value for sign in (0, 1 << 31) for value in borders], np.uint32)


@pytest.mark.parametrize("tag", EXPONENTS)
def test_every_value_that_is_no_number_is_found_and_no_other(tag: str) -> None:
    exponent = EXPONENTS[tag]
    for value in patterns(tag):
        odd = int(value) & exponent == exponent
        assert first_odd(np.full(1, value), tag) == (0 if odd else None), hex(value)


@pytest.mark.parametrize("tag", EXPONENTS)
@pytest.mark.parametrize("place", [0, 65535, 65536, 150_000])
def test_the_first_one_is_found_where_it_lies(tag: str, place: int) -> None:
    values = np.resize(patterns(tag)[:6] & (EXPONENTS[tag] - 1), 150_001)
    assert first_odd(values, tag) is None
    sign = 1 << 8 * values.itemsize - 1
    for odd in (EXPONENTS[tag], EXPONENTS[tag] | sign | 1):
        spoilt = values.copy()
        spoilt[place:] = odd
        assert first_odd(spoilt, tag) == place


@pytest.mark.parametrize("tag", EXPONENTS)
def test_nothing_holds_nothing_odd(tag: str) -> None:
    assert first_odd(patterns(tag)[:0], tag) is None


@pytest.mark.parametrize("form", ["compressed nvfp4", "gptq, scattered"])
def test_a_piece_has_no_more_values_than_of_an_unquantized_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    write(tmp_path / "a", FORMS[form], "dense")
    monkeypatch.setattr(task, "PIECE_BYTES", 4096)
    default = QuantSpec(4, 32, "affine")
    origin = open_source(tmp_path / "a")
    shapes = text_tensors(origin.config)
    assignment = {n.removesuffix(".weight"): fitted(default, s) for n, s in shapes.items() if is_linear(n, s)}
    for made in make_plan(origin, assignment, default, None).text:
        if made.has and not made.carried:
            row = made.shape[-1]
            assert all((stop - start) * row <= max(row, 4096 // 2) for start, stop in made.pieces())
            assert sum(stop - start for start, stop in made.pieces()) == made.rows
