"""Where the tokens of images and videos stand: their rotary positions, and which feature each of them takes.

Knows token ids and grids, in NumPy, because ids decide. Knows no pixels, no features and no model.

A placeholder token stands for merge x merge patches. An image is one run of placeholders, a video one run a frame pair,
with the text of its timestamps between. Inside a run the time does not advance, rows and columns count from where the
run began, and the text after it goes on past the larger side:

    tokens    a  b  <  i  i  i  i  i  i  >  c         an image of 2 x 3 placeholders
    time      0  1  2  3  3  3  3  3  3  6  7
    row       0  1  2  3  3  3  4  4  4  6  7
    column    0  1  2  3  4  5  3  4  5  6  7
    feature   .  .  .  0  1  2  3  4  5  .  .
    steps     1  1  1  0  0  0  0  0  3  1  1         time is the sum of the steps before
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ..errors import PromptError

KINDS = ("image", "video")


class Shaped(Protocol):
    """What positions need of a Media: its kind, "image" or "video", and its grid (frame pairs, rows, columns)."""

    @property
    def kind(self) -> str: ...
    @property
    def grid(self) -> tuple[int, int, int]: ...


@dataclass(frozen=True)
class Placement:
    """Tokens placed: B rows of T tokens each.

    positions [3, B, T + 1] int32: time, row and column of each token; the last is that of the text token to come.
    features [B, T] int32: which feature of the row's media, counted through all of them, a token takes; -1: none.
    """

    positions: np.ndarray
    features: np.ndarray

    def __getitem__(self, part: slice) -> Placement:
        """The tokens start:stop of every row."""
        start, stop, step = part.indices(self.features.shape[1])
        if step != 1:
            raise ValueError(f"tokens are taken one after the other, not in steps of {step}")
        stop = max(start, stop)
        return Placement(self.positions[:, :, start : stop + 1], self.features[:, start:stop])

    def padded(self, count: int) -> Placement:
        """The same with `count` padding tokens on the left of each row, at position 0."""
        return Placement(
            np.pad(self.positions, ((0, 0), (0, 0), (count, 0))),
            np.pad(self.features, ((0, 0), (count, 0)), constant_values=-1),
        )


def place(
    tokens: np.ndarray,
    media: Sequence[Shaped],
    *,
    image_token_id: int | None,
    video_token_id: int | None,
    merge: int,
    start: int = 0,
) -> Placement:
    """Place tokens [T] and the media whose placeholders are among them, in their order: a Placement of one row.

    start: the position of the first token. merge: patches on a side of one placeholder (spatial_merge_size).
    Raises PromptError where the placeholders are not exactly those of the media, or text interrupts a run.
    """
    tokens = np.asarray(tokens)
    steps = np.ones(len(tokens), np.int64)
    offsets = np.zeros((2, len(tokens)), np.int64)  # of row and column from where the run began
    features = np.full(len(tokens), -1, np.int64)
    grids = [(shown.kind, _merged(shown, merge)) for shown in media]
    sizes = [pairs * rows * columns for _, (pairs, rows, columns) in grids]
    firsts = np.cumsum([0, *sizes])
    for kind, token_id in zip(KINDS, (image_token_id, video_token_id), strict=True):
        own = [n for n, (other, _) in enumerate(grids) if other == kind]
        # Only where media are given are the ids placeholders; without, they are tokens like any other.
        at = np.flatnonzero(tokens == token_id) if token_id is not None and media else np.zeros(0, np.int64)
        wanted = sum(sizes[n] for n in own)
        if len(at) != wanted:
            raise PromptError(
                f"the prompt has {len(at)} {kind} placeholders (token {token_id}), its {kind}s need {wanted}: "
                "give every image and video in the order of the prompt, and let no text hold a placeholder"
            )
        if not own:
            continue
        runs = np.array([grids[n][1][1:] for n in own for _ in range(grids[n][1][0])])  # [runs, (rows, columns)]
        lengths = runs.prod(axis=1)
        ends = lengths.cumsum()
        count = np.arange(wanted)
        run = np.searchsorted(ends, count, side="right")
        inside = count - (ends - lengths)[run]
        if np.any((inside[1:] > 0) & (np.diff(at) != 1)):
            raise PromptError(f"the placeholders of one {kind} are not next to each other: leave its run whole")
        steps[at] = np.where(inside == lengths[run] - 1, runs.max(axis=1)[run], 0)
        offsets[:, at] = inside // runs[run, 1], inside % runs[run, 1]
        features[at] = np.concatenate([np.arange(firsts[n], firsts[n + 1]) for n in own])
    time = start + np.concatenate([[0], steps.cumsum()])
    positions = np.stack([time, time, time])
    positions[1:, :-1] += offsets
    return Placement(positions[:, None].astype(np.int32), features[None].astype(np.int32))


def positions(
    tokens: np.ndarray,
    media: Sequence[Shaped],
    *,
    image_token_id: int | None,
    video_token_id: int | None,
    merge: int,
) -> tuple[np.ndarray, int]:
    """tokens [T] of a whole sequence -> positions [3, T] int32, rope delta: position minus index of what follows."""
    placed = place(tokens, media, image_token_id=image_token_id, video_token_id=video_token_id, merge=merge)
    return placed.positions[:, 0, :-1], int(placed.positions[0, 0, -1]) - len(tokens)


def _merged(shown: Shaped, merge: int) -> tuple[int, int, int]:
    """(frame pairs, rows, columns) in placeholders; raises PromptError for a grid that has none."""
    pairs, height, width = shown.grid
    whole = pairs > 0 and height > 0 and width > 0 and height % merge == 0 and width % merge == 0
    if shown.kind not in KINDS or not whole or (shown.kind == "image" and pairs != 1):
        raise PromptError(
            f"{shown.kind!r:.20} with a grid of {shown.grid} patches: kind is image or video, the sides are multiples "
            f"of {merge}, and an image is one frame pair"
        )
    return pairs, height // merge, width // merge
