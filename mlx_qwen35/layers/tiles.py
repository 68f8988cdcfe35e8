"""The first half of a layer over many tokens, a tile of them at a time, so that its memory is that of a tile.

Knows how positions and masks are cut. A mixer carries on through its cache: the tiles give what the whole would give.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

Mix = Callable[..., mx.array]


def mix_in_tiles(
    mix: Mix,
    tile: int,
    x: mx.array,
    rope: tuple[mx.array, mx.array],
    cache: object,
    readable: mx.array | None,
    present: mx.array | None,
) -> mx.array:
    """mix(x, rope, cache, readable, present) -> [B, T, H] with at most `tile` tokens at once, evaluated.

    The arguments are DecoderLayer's; the cache must be one: it is what joins the tiles.
    """
    length = x.shape[1]
    held = 0 if readable is None else readable.shape[1] - length
    made = []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        y = mix(
            x[:, start:stop],
            (rope[0][..., start:stop, :], rope[1][..., start:stop, :]),
            cache,
            None if readable is None else readable[:, : held + stop],
            None if present is None else present[:, start:stop],
        )
        mx.eval(y, cache.state)
        made.append(y)
    return mx.concatenate(made, axis=1)
