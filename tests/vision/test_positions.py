"""Positions of tokens in any order of text, images and videos: against a walk token by token, and cut anywhere."""

from types import SimpleNamespace

import numpy as np
import pytest

from mlx_qwen35.errors import PromptError
from mlx_qwen35.vision.positions import Placement, place, positions
from tests.reference_vision import walk

IMAGE, VIDEO = 7, 8
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "merge": 2}


def shown(kind: str, *grid: int) -> SimpleNamespace:
    return SimpleNamespace(kind=kind, grid=grid)


def drawn(seed: int, merge: int = 2) -> tuple[list[int], list[SimpleNamespace]]:
    """A prompt of a dozen parts, some of which touch each other."""
    rng = np.random.RandomState(seed)
    tokens: list[int] = []
    media: list[SimpleNamespace] = []
    for _ in range(rng.randint(1, 12)):
        choice = rng.randint(4)
        if choice < 2:
            tokens += [1] * rng.randint(1, 20)
            continue
        pairs = 1 if choice == 2 else rng.randint(1, 5)
        height, width = rng.randint(1, 7, 2)
        media.append(shown("image" if choice == 2 else "video", int(pairs), int(merge * height), int(merge * width)))
        for _ in range(pairs):
            tokens += [IMAGE if choice == 2 else VIDEO] * (height * width)
            tokens += [2] * (rng.randint(3) if choice == 3 else 0)
    return tokens or [1], media


def test_the_drawn_example():
    placed = place(np.array([1, 1, 2, *[IMAGE] * 6, 3, 1]), [shown("image", 1, 4, 6)], **IDS)
    assert placed.positions[:, 0].tolist() == [
        [0, 1, 2, 3, 3, 3, 3, 3, 3, 6, 7, 8],
        [0, 1, 2, 3, 3, 3, 4, 4, 4, 6, 7, 8],
        [0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7, 8],
    ]
    assert placed.features.tolist() == [[-1, -1, -1, 0, 1, 2, 3, 4, 5, -1, -1]]


@pytest.mark.parametrize("merge", [1, 2, 3])
@pytest.mark.parametrize("seed", range(40))
def test_any_order_equals_a_walk(seed: int, merge: int):
    tokens, media = drawn(seed, merge)
    grids = {token: [m.grid for m in media if m.kind == kind] for token, kind in ((IMAGE, "image"), (VIDEO, "video"))}
    wanted, delta = walk(tokens, grids, merge)
    found, found_delta = positions(np.array(tokens), media, **IDS | {"merge": merge})
    assert found.dtype == np.int32 and found_delta == delta
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("seed", range(20))
def test_features_are_taken_in_the_order_of_their_kind(seed: int):
    tokens, media = drawn(seed)
    sizes = [np.prod(m.grid) // 4 for m in media]
    numbered = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    taken = place(np.array(tokens), media, **IDS).features[0]
    for token, kind in ((IMAGE, "image"), (VIDEO, "video")):
        own = [n for m, n in zip(media, numbered, strict=False) if m.kind == kind]
        wanted = np.concatenate(own) if own else []
        np.testing.assert_array_equal(taken[np.array(tokens) == token], wanted)
    assert (taken[~np.isin(tokens, [IMAGE, VIDEO])] == -1).all()


@pytest.mark.parametrize("seed", range(10))
def test_cut_anywhere(seed: int):
    tokens, media = drawn(seed)
    whole = place(np.array(tokens), media, **IDS)
    for cut in range(len(tokens) + 1):
        parts = whole[:cut], whole[cut:]
        for name in ("positions", "features"):
            ends = slice(0, -1) if name == "positions" else slice(None)
            joined = np.concatenate([getattr(part, name)[..., ends] for part in parts], axis=-1)
            np.testing.assert_array_equal(joined, getattr(whole, name)[..., ends])
        assert (parts[1].positions[:, 0, -1] == whole.positions[:, 0, -1]).all()
        if cut < len(tokens) and whole.features[0, cut] < 0:
            np.testing.assert_array_equal(parts[0].positions[:, 0, -1], whole.positions[:, 0, cut])


def test_later_tokens_begin_where_the_earlier_ended():
    tokens, media = [1, *[IMAGE] * 4, 1, *[VIDEO] * 6, 2], [shown("image", 1, 4, 4), shown("video", 1, 4, 6)]
    whole = place(np.array(tokens), media, **IDS)
    first = place(np.array(tokens[:5]), media[:1], **IDS)
    second = place(np.array(tokens[5:]), media[1:], **IDS, start=int(first.positions[0, 0, -1]))
    np.testing.assert_array_equal(second.positions, whole[5:].positions)
    assert second.features.max() == 5  # counted from the first of its own media


def test_padding():
    placed = place(np.array([IMAGE, IMAGE, 1]), [shown("image", 1, 2, 4)], **IDS).padded(2)
    assert placed.positions[0, 0].tolist() == [0, 0, 0, 0, 2, 3]
    assert placed.positions[2, 0].tolist() == [0, 0, 0, 1, 2, 3]
    assert placed.features.tolist() == [[-1, -1, 0, 1, -1]]


def test_without_media_a_placeholder_is_a_token():
    found, delta = positions(np.array([1, IMAGE, IMAGE, VIDEO]), [], **IDS)
    assert found.tolist() == [[0, 1, 2, 3]] * 3 and delta == 0


@pytest.mark.parametrize(
    "tokens, media, message",
    [
        ([1, *[IMAGE] * 3], [shown("image", 1, 4, 4)], "3 image placeholders .token 7., its images need 4"),
        ([1, *[IMAGE] * 5], [shown("image", 1, 4, 4)], "5 image placeholders"),
        ([*[IMAGE] * 4, VIDEO], [shown("image", 1, 4, 4)], "1 video placeholders"),
        ([*[VIDEO] * 4], [shown("video", 2, 4, 4)], "need 8"),
        ([IMAGE, IMAGE, 1, IMAGE, IMAGE], [shown("image", 1, 4, 4)], "not next to each other"),
        ([IMAGE], [shown("image", 1, 2, 3)], "multiples of 2"),
        ([IMAGE] * 2, [shown("image", 2, 2, 2)], "one frame pair"),
        ([IMAGE], [shown("sound", 1, 2, 2)], "'sound'"),
        ([1], [shown("image", 1, 0, 2)], "multiples of 2"),
    ],
)
def test_what_does_not_fit_is_refused(tokens: list[int], media: list[SimpleNamespace], message: str):
    with pytest.raises(PromptError, match=message):
        place(np.array(tokens), media, **IDS)


def test_a_placement_is_not_taken_in_steps():
    with pytest.raises(ValueError, match="steps"):
        Placement(np.zeros((3, 1, 4)), np.zeros((1, 3)))[::2]
