"""What norms' values tell of how they are written, and what they do not."""

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.checkpoint.files import open_file, open_folder
from mlx_qwen35.checkpoint.names import HF, MLX
from mlx_qwen35.checkpoint.norms import written
from mlx_qwen35.library import demo_folder


def seen(folder: Path, norms: list[np.ndarray], dtype: mx.Dtype = mx.float32) -> str | None:
    arrays = {str(n): mx.array(norm).astype(dtype) for n, norm in enumerate(norms)}
    mx.save_safetensors(str(folder / "norms.safetensors"), arrays)
    return written(open_file(folder / "norms.safetensors").entries.values())


def around(middle: float, spread: float, seed: int = 0) -> np.ndarray:
    return (middle + spread * np.random.default_rng(seed).standard_normal(512)).astype(np.float32)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_both_conventions(tmp_path: Path, dtype: mx.Dtype) -> None:
    trained = [around(0, 0.3), around(0.4, 0.1), around(-0.5, 0.1), around(0.7, 0.2)]  # each kind is in a real model
    assert seen(tmp_path, trained, dtype) == HF
    assert seen(tmp_path, [norm + 1 for norm in trained], dtype) == MLX
    assert seen(tmp_path, [norm + 2 for norm in trained], dtype) == MLX


def test_one_norm_with_both_signs_is_enough(tmp_path: Path) -> None:
    assert seen(tmp_path, [around(0, 0.3)] + [around(1, 0.1, n) for n in range(1, 8)]) == HF


def test_what_could_be_either(tmp_path: Path) -> None:
    assert seen(tmp_path, [np.zeros(512, np.float32)] * 4) is None  # before any training
    assert seen(tmp_path, [around(0.2, 0.02)] * 4) is None
    assert seen(tmp_path, [np.where(np.arange(512) < 8, -0.1, 1).astype(np.float32)] * 4) is None  # 1.6 % below zero
    assert written([]) is None


def test_matrices_and_integers_say_nothing(tmp_path: Path) -> None:
    others = {"a": -mx.ones((4, 4)), "b": mx.ones(4, mx.int32), "c": mx.zeros(0)}
    mx.save_safetensors(str(tmp_path / "a.safetensors"), others)
    assert written(open_file(tmp_path / "a.safetensors").entries.values()) is None


def test_the_trained_demo() -> None:
    entries = open_folder(demo_folder()).entries
    norms = {n: e for n, e in entries.items() if "norm" in n and n.endswith(".weight") and "visual" not in n}
    head = [e for name, e in norms.items() if name.startswith("mtp.")]
    text = [e for name, e in norms.items() if not name.startswith("mtp.") and "linear_attn" not in name]
    assert len(head) == 7 and written(head) == HF and written(text) == HF
    assert written([e for name, e in norms.items() if "linear_attn" in name]) == MLX  # plain in every layout
