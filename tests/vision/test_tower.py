"""The vision tower against NumPy; frames by themselves, in groups and in tiles; how much memory it takes."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_qwen35.vision import tower as module
from mlx_qwen35.vision.media import Levels
from mlx_qwen35.vision.tower import block_order, full_attention
from tests.seeing_model import PATCH, seeing_model, some_media

TOLERANCE = 1e-4
MEDIA = [
    some_media("image", 4, 6, seed=1),
    some_media("video", 3, 6, 4, seed=2),
    some_media("image", 6, 4, seed=3),
    some_media("image", 2, 2, seed=4),
    some_media("video", 2, 4, 6, seed=5),
    some_media("image", 2, 10, seed=6),
]


@pytest.fixture(scope="module")
def both():
    return seeing_model("dense", layer_types=["full_attention"])


def encoded(tower, media) -> list[np.ndarray]:
    return [np.array(f) for f in tower.encode([m.pixels for m in media], [m.grid for m in media])]


def test_equals_the_reference(both):
    model, reference = both
    for medium, found in zip(MEDIA, encoded(model.vision, MEDIA), strict=True):
        wanted = reference.vision.features(medium.pixels, medium.grid)
        assert found.shape == wanted.shape and wanted.std() > 0.1
        np.testing.assert_allclose(found, wanted, atol=TOLERANCE)


@pytest.mark.parametrize("most", [1, 30, 48, 100])
def test_groups_change_nothing(both, monkeypatch, most):
    whole = encoded(both[0].vision, MEDIA)
    monkeypatch.setattr(module, "_MOST_PATCHES", most)
    for found, wanted in zip(encoded(both[0].vision, MEDIA), whole, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_groups_hold_frames_of_one_size_up_to_their_room():
    grids = [(1, 4, 6), (5, 2, 2), (3, 4, 6), (1, 6, 4)]
    assert list(module._groups(grids, 4, 6, 2)) == [[(0, 0, 1), (2, 0, 1)], [(2, 1, 3)]]
    assert list(module._groups(grids, 2, 2, 3)) == [[(1, 0, 3)], [(1, 3, 5)]]
    assert list(module._groups(grids, 4, 6, 4)) == [[(0, 0, 1), (2, 0, 3)]]


def test_a_frame_sees_itself_only(both):
    video = some_media("video", 3, 4, 4)
    pixels = video.pixels.copy()
    pixels[16:32] += 1
    before, after = (both[0].vision.encode([p], [video.grid])[0] for p in (video.pixels, pixels))
    changed = np.array(mx.abs(before - after).max(axis=1) > 1e-6)
    assert changed.tolist() == [False] * 4 + [True] * 4 + [False] * 4


def test_nothing_to_encode(both):
    assert both[0].vision.encode([], []) == []


@pytest.mark.parametrize("shape", [(23, PATCH), (24, PATCH - 1)])
def test_pixels_that_do_not_fit_the_grid(both, shape):
    with pytest.raises(ValueError, match="grid .1, 4, 6. are"):
        both[0].vision.encode([np.zeros(shape, np.float32)], [(1, 4, 6)])


@pytest.mark.parametrize("parts", [1, 7, 30, 10**6])
def test_an_mlp_in_parts_changes_nothing(both, monkeypatch, parts):
    whole = encoded(both[0].vision, MEDIA)
    monkeypatch.setattr(module, "_MOST_ACTIVATIONS", parts * both[0].vision.blocks[0].mlp.width)
    for found, wanted in zip(encoded(both[0].vision, MEDIA), whole, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_levels_are_the_same_as_their_pixel_values(both):
    """In groups of frames of several media, and where one frame is gone through in parts."""
    levels = [
        Levels(np.random.RandomState(n).randint(0, 256, m.pixels.shape, dtype=np.uint8), (0.1, 0.5, 0.9), (0.5, 1, 2))
        for n, m in enumerate(MEDIA)
    ]
    grids = [m.grid for m in MEDIA]
    for found, wanted in zip(
        both[0].vision.encode(levels, grids), both[0].vision.encode([rows[:] for rows in levels], grids), strict=True
    ):
        assert np.array_equal(found, wanted)


@pytest.mark.parametrize("least", [1, 6, 256])
@pytest.mark.parametrize("most", [1, 100, 20 * 20, 2 * 20 * 20, 5 * 20 * 20])
def test_tiles_change_nothing(monkeypatch, most, least):
    """Of some queries of one head, of whole heads, and of heads of both frames."""
    monkeypatch.setattr(module, "_LEAST_ROWS", least)
    q, k, v = (mx.array(np.random.RandomState(n).standard_normal((2, 3, 20, 12)).astype(np.float32)) for n in range(3))
    whole = full_attention(q, k, v)
    np.testing.assert_allclose(np.array(full_attention(q, k, v, most_scores=most)), np.array(whole), atol=1e-6)
    scores = mx.softmax(q @ k.swapaxes(2, 3) / 12**0.5, axis=-1)
    np.testing.assert_allclose(np.array(whole), np.array(scores @ v), atol=1e-5)


@pytest.mark.parametrize("dim", [12, 64, 72])
def test_heads_filled_up_for_a_gpu_change_nothing(monkeypatch, dim):
    q, k, v = (mx.array(np.random.RandomState(n).standard_normal((1, 2, 9, dim))).astype(mx.float16) for n in range(3))
    plain = np.array(full_attention(q, k, v))
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    found = full_attention(q, k, v)
    assert found.shape == (1, 2, 9, dim)
    np.testing.assert_allclose(np.array(found), plain, atol=2e-3)


def test_block_order_is_as_drawn():
    rows, columns = block_order(4, 4, 2)
    number = np.zeros((4, 4), int)
    number[rows, columns] = np.arange(16)
    assert number.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_memory_does_not_grow_with_the_frames(both, monkeypatch):
    monkeypatch.setattr(module, "_MOST_PATCHES", 256)
    tower, peaks = both[0].vision, []
    for pairs in (8, 64):
        video = some_media("video", pairs, 16, 16)
        mx.clear_cache()
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        features = tower.encode([video.pixels], [video.grid])[0]
        peaks.append(mx.get_peak_memory() - before - 2 * features.nbytes)  # in pieces, and joined
        del features
    assert peaks[1] < 1.2 * peaks[0]


def test_memory_of_one_large_frame(both, monkeypatch):
    """Neither scores nor activations of all its patches exist at once."""
    monkeypatch.setattr(module, "_MOST_PATCHES", 256)
    monkeypatch.setattr(module, "_MOST_ACTIVATIONS", 256 * both[0].vision.blocks[0].mlp.width)
    image = some_media("image", 64, 64)
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    features = both[0].vision.encode([image.rows], [image.grid])[0]
    peak = mx.get_peak_memory() - before
    scores = 2 * 4096 * 4096 * 4  # of both heads
    assert peak < scores / 2 and features.shape[0] == 1024
