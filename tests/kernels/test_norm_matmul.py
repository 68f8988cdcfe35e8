"""A sum, its norm and the product that meets it in one: every form, unequal sizes, and bits that do not move."""

import mlx.core as mx
import pytest

from mlx_qwen35.kernels.norm_matmul import norm_matmul
from mlx_qwen35.kernels.norm_matmul.reference import norm_matmul as reference
from tests.kernels.stacks import FORMS, Matrix, all_of, flat
from tests.metal_emulator import check, compile_for_cuda, poisoned_outputs

F32, BF16 = mx.float32, mx.bfloat16


def case(forms, rows, dtype, *, hidden=384, outputs=21, added=True, norm=F32):
    """forms: of one matrix, or of two."""
    mx.random.seed(rows)
    matrices = [Matrix.random(form, (outputs, hidden), dtype) for form in forms]
    x, more = (mx.random.normal((rows, hidden)).astype(dtype) for _ in range(2))
    weight = mx.random.uniform(0.3, 2, (hidden,)).astype(norm)

    def call(operation):
        def called(x, more, weight, *arrays):
            return operation(x, more if added else None, weight, *all_of(matrices, arrays), eps=1e-3)

        return called

    return {"kernels": call(norm_matmul), "reference": call(reference), "arrays": [x, more, weight, *flat(matrices)]}


@pytest.mark.parametrize("forms", [*zip(FORMS[::2], FORMS[1::2], strict=True)], ids=str)
def test_every_form(forms):
    """bfloat16 as on a GPU; gate and up in unequal forms."""
    check(**case(forms, 1, BF16, norm=BF16))


def test_float32():
    check(**case([("mxfp4", 4, 32), ("affine", 5, 32)], 2, F32), sanitize=True)
    check(**case([None], 2, F32, added=False))


@pytest.mark.parametrize("rows, outputs, hidden", [(1, 8, 64), (8, 9, 64), (9, 3, 64), (19, 260, 64), (2, 5, 1024)])
def test_sizes(rows, outputs, hidden):
    """Any number of rows; fewer outputs than a threadgroup makes, and more than values in a row."""
    check(**case([("affine", 4, 64)], rows, F32, outputs=outputs, hidden=hidden))


def test_a_row_has_the_same_bits_alone_and_in_any_number():
    given = case([("affine", 4, 64), ("affine", 4, 64)], 19, BF16)
    x, more, *rest = given["arrays"]
    with poisoned_outputs():
        all_rows = given["kernels"](x, more, *rest)
        for first, last in ((0, 1), (3, 4), (4, 11), (10, 19)):
            some = given["kernels"](x[first:last], more[first:last], *rest)
            assert all(mx.array_equal(a[first:last], b) for a, b in zip(all_rows, some, strict=True))


def test_what_goes_on_is_the_rounded_sum():
    """Bit for bit x + added in bfloat16, so that the residual is the same whoever adds."""
    given = case([("affine", 4, 64)], 3, BF16)
    with poisoned_outputs():
        assert mx.array_equal(given["kernels"](*given["arrays"])[0], given["arrays"][0] + given["arrays"][1])


def test_zeros_stay_zero():
    given = case([None], 2, F32)
    _, _, *rest = given["arrays"]
    check(given["kernels"], given["reference"], [mx.zeros((2, 384)), mx.zeros((2, 384)), *rest])


@pytest.mark.parametrize("forms", [[("affine", 4, 64)], [("mxfp4", 4, 32), None]], ids=str)
def test_compiles_for_cuda(forms):
    given = case(forms, 2, BF16)
    assert compile_for_cuda(given["kernels"], given["arrays"]) == {"norm_matmul"}
