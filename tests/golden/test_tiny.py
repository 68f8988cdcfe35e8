"""Our logits against transformers' on the checkpoints of make_tiny.py, made and computed on the spot.

Needs the folder with the reference programs, torch and transformers, and is skipped without them; test_golden.py covers
the same ground for text without, and tests/vision for images and videos. Their MTP layer is not compared.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file

from mlx_qwen35 import load_model
from mlx_qwen35.vision import Media
from tests import figures

TOLERANCE = 2e-3


@pytest.fixture(scope="module", params=["tiny", "heads"])
def folders(request: pytest.FixtureRequest, shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The dense and the MoE checkpoint of one preset."""
    script = shared_dir / "reference/make_tiny.py"
    if not script.is_file():
        pytest.skip("the folder 'shared' has no reference/make_tiny.py")
    for module in ("torch", "transformers"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: the reference cannot run")
    target = tmp_path_factory.mktemp(request.param)
    subprocess.run([sys.executable, script, "--out", target, "--preset", request.param],
                   check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=600)
    return sorted(target.iterdir())


def media_of(reference: dict[str, np.ndarray], case: str) -> tuple[list[Media], np.ndarray]:
    """The images, then the videos of a case, and the features of all of them."""
    media, features = [], []
    for kind, ending in (("image", ""), ("video", "_videos")):
        if f"{case}.pixel_values{ending}" in reference:
            grids = [tuple(map(int, grid)) for grid in reference[f"{case}.{kind}_grid_thw"]]
            ends = np.cumsum([t * h * w for t, h, w in grids])[:-1]
            pixels = np.split(reference[f"{case}.pixel_values{ending}"], ends)
            media += [Media(kind, rows, grid) for rows, grid in zip(pixels, grids, strict=True)]
            features.append(reference[f"{case}.{kind}_features"])
    return media, np.concatenate(features) if features else np.zeros((0, 0))


@pytest.mark.parametrize("case", ["text", "long", "image", "video", "mixed"])
def test_logits(folders: list[Path], case: str) -> None:
    assert [folder.name.rsplit("-", 1)[1] for folder in folders] == ["dense", "moe"]
    for folder in folders:
        reference = load_file(folder / "reference.safetensors")
        ids, expected = mx.array(reference[f"{case}.input_ids"]), reference[f"{case}.logits"]
        model, tokens = load_model(folder), ids.shape[1]
        media, features = media_of(reference, case)
        if media:
            found = mx.concatenate(model.encode_media(media))
            figures.hold(figures.FEATURES, float(np.abs(np.array(found) - features).max()))
        sight = model.see(ids, media)
        assert np.array_equal(np.array(sight.positions)[:, 0], reference[f"{case}.position_ids"][-3:, 0]), folder.name
        assert sight.next_positions[0] == tokens + reference[f"{case}.rope_delta"].item()
        ways = {
            "whole": [0, tokens],
            "odd chunks": [0, 1, 3, 10, *range(11, tokens, 17), tokens],
            "one by one": [*range(tokens + 1)],
        }
        for way, cuts in ways.items():
            cache = model.make_cache()
            parts = [model(ids[:, start:stop], cache, sight[start:stop]) for start, stop in pairwise(cuts)]
            worst = float(np.abs(np.array(mx.concatenate(parts, axis=1)) - expected).max())
            print(f"{folder.name} {case} {way}: {worst:.1e}")
            assert worst <= TOLERANCE, f"{folder.name}, {way}"
