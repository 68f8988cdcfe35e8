"""Damaged checkpoints of every published form: a CheckpointError, or a model, and nothing else; in convert() too."""

import random
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.load import load_model
from mlx_qwen35.conversion.convert import convert
from mlx_qwen35.errors import CheckpointError
from tests.checkpoint.foreign import Written
from tests.checkpoint.published import FORMS, write

SIZES = {"F32": 4, "F16": 2, "BF16": 2, "U8": 1, "I8": 1, "I32": 4, "U32": 4, "F8_E4M3": 1, "I64": 8}


def damage(written: Written, chosen: random.Random) -> None:
    """Something of one tensor of a linear map: gone, of another dtype or shape, or other bytes."""
    name = chosen.choice([name for name in written if "_proj." in name])
    tag, value = written[name]
    how = chosen.choice(["gone", "dtype", "short", "flat", "turned", "bytes"])
    if how == "gone":
        del written[name]
    elif how == "dtype":
        written[name] = chosen.choice([other for other in SIZES if SIZES[other] == SIZES[tag]]), value
    elif how == "short" and value.ndim:
        written[name] = tag, value[: max(0, len(value) - chosen.randint(1, 3))]
    elif how == "flat":
        written[name] = tag, value.reshape(-1)
    elif how == "turned" and value.ndim == 2:
        written[name] = tag, np.ascontiguousarray(value.T)
    elif value.size:
        raw = bytearray(value.tobytes())
        for _ in range(4):
            raw[chosen.randrange(len(raw))] = chosen.randrange(256)
        written[name] = tag, np.frombuffer(bytes(raw), value.dtype).reshape(value.shape)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", FORMS)
def test_tensors(tmp_path: Path, form: str) -> None:
    for seed in range(4):
        chosen = random.Random(f"{form} {seed}")
        folder = tmp_path / str(seed)
        write(folder, FORMS[form], chosen.choice(["dense", "moe"]), change=lambda w, chosen=chosen: damage(w, chosen))
        try:
            mx.eval(load_model(folder)(mx.array([[1, 2, 3]])))
        except CheckpointError as error:
            assert str(folder) in str(error) or "model.safetensors" in str(error)
        if seed == 0:
            try:
                convert(folder, tmp_path / "out", group_size=32)
            except CheckpointError as error:
                assert not (tmp_path / "out").exists() and str(error)
