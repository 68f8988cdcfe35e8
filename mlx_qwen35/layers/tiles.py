"""The first half of a layer over many tokens, a tile of them at a time, so that its memory is that of a tile.

Knows how positions and masks are cut. A mixer carries on through its cache: the tiles give what the whole would give.
"""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx

from .around import Around

Mix = Callable[..., mx.array]


def mix_in_tiles(
    mix: Mix,
    tile: int,
    x: mx.array,
    around: Around,
    cache: object,
) -> mx.array:
    """mix(x, around, cache) -> [B, T, H] with at most `tile` tokens at once, evaluated.

    The arguments are DecoderLayer's; the cache must be one: it is what joins the tiles.
    """
    length, made = x.shape[1], []
    for start in range(0, length, tile):
        stop = min(start + tile, length)
        y = mix(x[:, start:stop], around.part(start, stop), cache)
        mx.eval(y, cache.state)
        made.append(y)
    return mx.concatenate(made, axis=1)
