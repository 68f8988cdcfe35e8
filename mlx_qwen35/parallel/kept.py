"""What a rank holds of a session, in a file of its own beside rank 0's: written whole or not at all.

Knows files, caches and snapshots. Knows no sessions.

    chat.session              rank 0's: tokens, its layers, and the name of what belongs together
    chat.session.rank1of2-NAME    keys and values, and states at each point, in the order in which rank 0 has its own

A session that is saved again gets a new name: until rank 0's file names it, the older ones are there, whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.cache import Cache, DeltaState, Elsewhere, KVCache, Snapshot, StretchedKVCache
from mlx_qwen35.cache.kv import Stretch
from mlx_qwen35.errors import SessionError
from mlx_qwen35.machine.files import flush_names, flush_path, listed

Past = tuple[Cache, Snapshot]


def path_of(path: Path, rank: int, ranks: int, name: str) -> Path:
    """Of a rank's share of the session at `path`."""
    return path.with_name(f"{path.name}.rank{rank}of{ranks}-{name}")


def keep(path: Path, rank: int, ranks: int, name: str) -> None:
    """Delete the shares of the session at `path` that have another name."""
    mine = path_of(path, rank, ranks, name)
    for other in listed(path.parent, f"{escape(path.name)}.rank{rank}of{ranks}-*"):
        if other != mine:
            other.unlink(missing_ok=True)


@dataclass(frozen=True)
class Share:
    """What goes into a file: computed arrays, and what they are. Nothing of it changes with the caches any more."""

    about: dict[str, Any]
    arrays: dict[str, mx.array]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())


def write(path: Path, name: str, pasts: Sequence[Past | None]) -> None:
    """In place of what may be there, which stays whole until the new one is. Raises OSError."""
    put(path, name, packed(pasts))


def packed(pasts: Sequence[Past | None]) -> Share:
    """Of pasts, in their order; computed on return."""
    arrays: dict[str, mx.array] = {}
    holders: list[Cache] = []
    points: list[dict[str, Any] | None] = []
    for number, past in enumerate(pasts):
        if past is None:
            points.append(None)
            continue
        cache, snapshot = past
        if not any(cache is holder for holder in holders):
            holders.append(cache)
        at = next(n for n, holder in enumerate(holders) if holder is cache)
        points.append({"holder": at, "offset": snapshot.offset})
        for layer, pair in enumerate(snapshot.detached().delta):
            for kind, state in zip(("conv", "matrix"), pair or (), strict=False):
                if state is not None:
                    arrays[f"points.{number}.{layer}.{kind}"] = state
    layers = [[_put(layer, f"holders.{n}.{at}", arrays) for at, layer in enumerate(holder.layers)]
              for n, holder in enumerate(holders)]  # fmt: skip
    mx.eval(list(arrays.values()))
    return Share({"points": points, "layers": layers}, arrays)


def put(path: Path, name: str, share: Share) -> None:
    """As `write`; from any thread."""
    arrays, about = share.arrays, share.about | {"name": name}
    metadata = {"format": "mlx-qwen35-share", "about": json.dumps(about), "checksum": _checksum(arrays)}
    partial = path.with_name(f".{path.name}.{os.getpid()}.safetensors")
    try:
        mx.save_safetensors(str(partial), arrays or {"empty": mx.zeros(1)}, metadata)
        flush_path(partial)
        os.replace(partial, path)
        flush_names(path.parent)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        raise error if isinstance(error, OSError) else OSError(f"{path} cannot be written ({error})") from error


def read(path: Path, name: str, make_cache: Callable[[], Cache]) -> list[Past | None]:
    """What `write` was given; raises SessionError where the file is damaged, missing or of another session."""
    try:
        arrays, metadata = mx.load(str(path), format="safetensors", return_metadata=True)
        about = json.loads(metadata["about"])
        arrays.pop("empty", None)
        whole = metadata["checksum"] == _checksum(arrays)
    except (OSError, RuntimeError, ValueError, KeyError) as error:
        raise SessionError(f"{path} is this rank's share of the session, and cannot be read ({error})") from None
    if not whole:
        raise SessionError(f"{path} is damaged: its checksum is another. Delete the session")
    if about["name"] != name:
        raise SessionError(f"{path} is of another session, or of another time: delete it, and the session")
    holders = []
    for number, layers in enumerate(about["layers"]):
        cache = make_cache()
        for at, what in enumerate(layers):
            _take(cache.layers[at], what, f"holders.{number}.{at}", arrays)
        holders.append(cache)
    found: list[Past | None] = []
    for number, point in enumerate(about["points"]):
        if point is None:
            found.append(None)
            continue
        cache = holders[point["holder"]]
        delta = tuple(
            tuple(arrays.get(f"points.{number}.{at}.{kind}") for kind in ("conv", "matrix"))
            if isinstance(layer, DeltaState)
            else None
            for at, layer in enumerate(cache.layers)
        )
        cache.offset = max(cache.offset, point["offset"])
        found.append((cache, Snapshot(point["offset"], 0, delta, 0)))
    return found


def _put(layer: Any, name: str, arrays: dict[str, mx.array]) -> Any:
    """-> what it is: None of a state, else the lengths of its stretches and whether they are packed."""
    if isinstance(layer, (DeltaState, Elsewhere)):
        return None
    if isinstance(layer, KVCache):
        whole = Stretch()
        if layer.keys is not None:
            whole.keys, whole.values, whole.length = (layer.keys,), (layer.values,), layer.offset
        stretches = [whole] if layer.offset else []
    else:
        stretches = layer.stretches
    for number, stretch in enumerate(stretches):
        for kind, parts in zip(("keys", "values"), stretch.block(0, stretch.length), strict=True):
            arrays |= {f"{name}.{number}.{kind}.{n}": part for n, part in enumerate(parts)}
    return [(stretch.length, stretch.form is not None) for stretch in stretches]


def _take(layer: Any, what: Any, name: str, arrays: dict[str, mx.array]) -> None:
    if what is None:
        return
    stretches = []
    for number, (length, packed) in enumerate(what):
        stretch = Stretch(layer.form if packed else None)
        count = 3 if packed else 1
        stretch.keys, stretch.values = (
            tuple(arrays[f"{name}.{number}.{kind}.{n}"] for n in range(count)) for kind in ("keys", "values")
        )
        stretch.length = length
        stretches.append(stretch)
    if isinstance(layer, StretchedKVCache):
        layer.stretches = stretches
    elif stretches:
        (layer.keys,), (layer.values,), layer.offset = stretches[0].keys, stretches[0].values, stretches[0].length


def _checksum(arrays: dict[str, mx.array]) -> str:
    made = hashlib.blake2b(digest_size=16)
    for name in sorted(arrays):
        array = arrays[name]
        made.update(f"{name} {array.dtype} {array.shape}".encode())
        values = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
        made.update(np.ascontiguousarray(np.array(values)))
    return made.hexdigest()
