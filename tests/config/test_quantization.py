"""What there is of quantizations is what MLX has, whichever version of it is here."""

import mlx.core as mx
import pytest

from mlx_qwen35.config import BITS, USUAL, ModelConfig
from mlx_qwen35.config.quantization import GROUP_SIZES, READ_BITS
from mlx_qwen35.errors import CheckpointError
from tests.checkpoints import tiny_config

WEIGHT = mx.random.normal((2, 256), key=mx.random.key(3))


def has(bits: int, group_size: int, mode: str) -> bool:
    try:
        mx.eval(mx.quantize(WEIGHT, group_size, bits, mode))
        return True
    except ValueError:
        return False


@pytest.mark.parametrize("mode", GROUP_SIZES)
def test_bits_and_groups_are_those_of_mlx(mode: str) -> None:
    theirs = {(bits, group) for bits in range(1, 17) for group in (8, 16, 32, 64, 128, 256) if has(bits, group, mode)}
    ours = {(bits, group) for bits in BITS[mode] for group in GROUP_SIZES[mode]}
    assert theirs - {(1, group) for group in GROUP_SIZES["affine"]} == ours  # with one bit it is read, not made
    assert set(READ_BITS[mode]) - set(BITS[mode]) == ({1} if mode == "affine" else set())


@pytest.mark.parametrize("mode", USUAL)
def test_what_is_usual_is_what_mlx_does_unasked(mode: str) -> None:
    bits, group_size = USUAL[mode]
    for ours, theirs in zip(mx.quantize(WEIGHT, group_size, bits, mode), mx.quantize(WEIGHT, mode=mode), strict=True):
        assert mx.array_equal(ours, theirs)


@pytest.mark.parametrize("mode", ["fp5", 5, ["affine"], {"a": 1}])
@pytest.mark.parametrize("left", [{}, {"bits": 4}, {"group_size": 32}, {"bits": 4, "group_size": 32}], ids=str)
def test_a_mode_of_an_entry_that_mlx_lacks_is_named(mode: object, left: dict[str, int]) -> None:
    """Whatever else the entry leaves out, in whose place something is guessed."""
    said = {"group_size": 64, "bits": 4, "a.b": {**left, "mode": mode}}
    with pytest.raises(CheckpointError, match=r"a\.b\.mode.*MLX knows affine, mxfp4"):
        ModelConfig.from_dict(tiny_config() | {"quantization": said})
