"""A session to a file and back, bit for bit.

Knows what a session consists of and whether a file fits a model. The file itself is file.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from mlx_qwen35 import checks
from mlx_qwen35.cache import AnyLayer, Cache, DeltaState, KVCache, Snapshot, StretchedKVCache
from mlx_qwen35.cache.kv import KVFormat, Stretch
from mlx_qwen35.errors import SessionError
from mlx_qwen35.session import file, newer
from mlx_qwen35.session.fingerprint import fingerprint, fingerprint_of_head
from mlx_qwen35.session.timeline import Pool, Timeline
from mlx_qwen35.speculative.drafters import HeadDrafter, Taken
from mlx_qwen35.speculative.pace import MOST, Pace

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.session.marks import Mark

_STATES, _KINDS = ("conv", "matrix"), ("keys", "values")


class Session(Timeline):
    """What was computed of one conversation or document; it goes to a file and comes back from it.

    `stream_generate(..., session=)` goes on with it. How: see Timeline.
    """

    def save(self, path: str | Path) -> None:
        """Writes it to a file, in place of what may be there: that stays whole until the new one is. `load_session`
        reads it. Raises WriteError where the disk refuses, SessionError while an answer is made."""
        save_session(self, path)

    def save_notes(self, path: str | Path) -> None:
        """Writes the notes alone, to a small file beside the one that `save` wrote to `path`: `load_session` finds
        them there. Raises WriteError."""
        newer.write(Path(path), self.notes)


def save_session(session: Session, path: str | Path) -> None:
    """Write a session to a file, in place of what may be there: that stays whole until the new one is.

    Raises WriteError where the disk refuses, SessionError while an answer is made.
    """
    session.agree("save it")
    whose = fingerprint(session.model, session.processor)
    description, arrays = packed(session, whose, session.marks)
    points = [*(mark.snapshot.point for mark in session.marks), session.cache.snapshot().point]
    name = description["share"] = session.model.pasts.save(Path(path), points)
    file.write(Path(path), description, arrays)
    if name is not None:
        session.model.pasts.keep(Path(path), name)
    newer.forget(Path(path))


def packed(
    session: Timeline, whose: Mapping[str, str], marks: Iterable[Mark]
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """(description, arrays) of a session, with these of its marks, for `file.write`; nothing is copied. whose: its
    fingerprint."""
    cache, arrays = session.cache, {"tokens": mx.array(session.tokens, mx.uint32)}
    layers = _put_layers(cache.layers, "layers", arrays)
    marks, kept = list(marks), []
    for number, mark in enumerate(marks):
        taken = mark.snapshot
        kept.append({"offset": mark.offset, "met": mark.met, "rope_delta": taken.rope_delta})
        for at, pair in enumerate(taken.delta):
            _put_states(pair or (), f"marks.{number}.{at}", arrays)
    description = {
        "fingerprint": dict(whose),
        "kv": form_of(session.model),
        "rope_delta": cache.rope_delta,
        "layers": layers,
        "marks": kept,
        "drafts": _put_drafts(session, marks, arrays),
        "shown": session.shown,
        "notes": session.notes,
    }
    return description, arrays


def load_session(
    path: str | Path,
    model: Model,
    processor: Processor | None = None,
    *,
    snapshot_bytes: int | None = None,
    pool: Pool | None = None,
) -> Session:
    """The session that `save_session` wrote; what it computes next is what it would have computed then, bit for bit.

    snapshot_bytes, pool: as in Session. Raises SessionError with the reason where the file is damaged or cut off, is no
    session, or is that of another model, quantization, tokenizer or template.
    """
    checks.path("path", path)
    checks.model_and_processor("load_session", model, processor, optional=True)
    path = Path(path)
    check_fit(path, file.read_description(path), fingerprint(model, processor), model)
    description, arrays = file.read_all(path)
    session = Session(model, processor, snapshot_bytes=snapshot_bytes, pool=pool)
    points = model.pasts.load(path, description.get("share"), len(description["marks"]) + 1)
    unpack(description, arrays, session, points)
    session.notes = newer.read(path, description["notes"])
    if pool is not None:
        pool.used(session)
    return session


def unpack(
    description: dict[str, Any], arrays: dict[str, mx.array], session: Session, points: Sequence[Any] = ()
) -> None:
    """Give a new session what `packed` made of one, notes excepted. points: what other ranks call its pasts, the marks'
    and the present one."""
    model = session.model
    session.tokens = arrays["tokens"].tolist()
    cache = Cache(_layers(description["layers"], "layers", arrays, model.kv_form))
    cache.offset, cache.rope_delta = len(session.tokens), description["rope_delta"]
    drafts = _drafts(description.get("drafts"), arrays, model, cache)
    for number, mark in enumerate(description["marks"]):
        delta = tuple(
            _states(f"marks.{number}.{at}", arrays) if isinstance(layer, DeltaState) else None
            for at, layer in enumerate(cache.layers)
        )
        point = points[number] if points else None
        snapshot = Snapshot(mark["offset"], mark["rope_delta"], delta, 0, drafts.get(number), point=point)
        session.marks.add(mark["offset"], snapshot, met=mark["met"])
    cache.point = points[-1] if points else None
    now = drafts.get(len(description["marks"]))
    if now is not None:
        cache.draft, at_end = now
        cache.draft.go_back(at_end, cache.offset)
    session.cache = cache
    session.shown = [(start, medium) for start, medium in description["shown"]]


def part_of(description: dict[str, Any], point: int) -> file.Part | None:
    """What `cut_to` needs of each array for the past up to a point, one of its marks; None: all of them, since this is
    the end, or keys and values lie in stretches."""
    kept = [mark["offset"] for mark in description["marks"] if mark["offset"] <= point]
    if kept[-1:] != [point] or any(isinstance(layer, list) for layer in description["layers"]):
        return None

    def part(name: str, values: np.ndarray) -> np.ndarray | None:
        whose, *rest = name.split(".")
        if whose == "tokens":
            return values[:point]
        if whose == "layers":
            return values[..., :point, :] if rest[-1] in _KINDS else None
        return None if whose in ("marks", "drafts") and int(rest[0]) >= len(kept) else values

    return part


def cut_to(description: dict[str, Any], arrays: dict[str, mx.array], point: int) -> None:
    """Makes what `part_of` left of a session one that ends at that point."""
    marks = [mark for mark in description["marks"] if mark["offset"] <= point]
    last = len(marks) - 1
    for at in range(len(description["layers"])):
        _put_states(_states(f"marks.{last}.{at}", arrays), f"layers.{at}", arrays)
    description |= {
        "layers": [layer and point for layer in description["layers"]],
        "marks": marks,
        "rope_delta": marks[-1]["rope_delta"],
        "shown": [(start, medium) for start, medium in description["shown"] if start < point],
    }
    drafts = description["drafts"]
    if drafts is not None:
        drafts["points"] = [*drafts["points"][: last + 1], drafts["points"][last]]
        arrays |= {
            f"drafts.{last + 1}.{kind}": arrays[f"drafts.{last}.{kind}"]
            for kind in Taken._fields
            if f"drafts.{last}.{kind}" in arrays
        }


def check_fit(path: Path, description: dict[str, Any], here: Mapping[str, str], model: Model) -> None:
    """Raises SessionError where a file is not that of a model with the fingerprint `here`."""
    saved = description.get("fingerprint")
    if not isinstance(saved, dict):
        raise SessionError(f"{path} is damaged: it does not say whose session it is. Delete it")
    other = [name for name in here if name in saved and saved[name] != here[name]]
    if description.get("kv") != form_of(model):
        other.append("kv_bits")
    if other:
        file.read_all(path)  # what does not fit may also be damaged, which is said first
        raise SessionError(
            f"{path} does not fit this model: it was saved with other {', '.join(other)}. Load what it was saved with, "
            "or begin a new session"
        )


def form_of(model: Model) -> list[int] | None:
    """How the model keeps keys and values, as a file says it."""
    form = model.kv_form
    return None if form is None else [form.bits, form.group_size, form.start]


def _put_layer(layer: AnyLayer, name: str, arrays: dict[str, mx.array]) -> Any:
    """Adds its arrays; -> what they are: None of a delta layer, a length of one array each, or a list of stretches."""
    if isinstance(layer, DeltaState):
        _put_states(layer.state, name, arrays)
        return None
    if isinstance(layer, KVCache):
        if layer.offset:
            arrays[f"{name}.keys"] = layer.keys[..., : layer.offset, :]
            arrays[f"{name}.values"] = layer.values[..., : layer.offset, :]
        return layer.offset
    kept = []
    for number, stretch in enumerate(layer.stretches):
        for kind, parts in zip(_KINDS, stretch.block(0, stretch.length), strict=True):
            arrays |= {f"{name}.{number}.{kind}.{n}": part for n, part in enumerate(parts)}
        kept.append({"length": stretch.length, "packed": stretch.form is not None, "frozen": stretch.frozen})
    return kept


def _put_layers(layers: Sequence[AnyLayer], name: str, arrays: dict[str, mx.array]) -> list[Any]:
    return [_put_layer(layer, f"{name}.{number}", arrays) for number, layer in enumerate(layers)]


def _layers(kept: list[Any], name: str, arrays: dict[str, mx.array], form: KVFormat | None = None) -> list[AnyLayer]:
    """What `_put_layers` put."""
    return [_layer(about, f"{name}.{number}", arrays, form) for number, about in enumerate(kept)]


def _layer(kept: Any, name: str, arrays: dict[str, mx.array], form: KVFormat | None) -> AnyLayer:
    if kept is None:
        layer = DeltaState()
        layer.update(*_states(name, arrays))
        return layer
    if isinstance(kept, int):
        layer = KVCache()
        if kept:
            layer.keys, layer.values, layer.offset = arrays[f"{name}.keys"], arrays[f"{name}.values"], kept
        return layer
    stretches = []
    for number, about in enumerate(kept):
        stretch = Stretch(form if about["packed"] else None)
        count = 3 if about["packed"] else 1
        stretch.keys, stretch.values = (
            tuple(arrays[f"{name}.{number}.{kind}.{n}"] for n in range(count)) for kind in _KINDS
        )
        stretch.length, stretch.frozen = about["length"], about["frozen"]
        stretches.append(stretch)
    return StretchedKVCache(form, stretches)


def _put_states(states: Any, name: str, arrays: dict[str, mx.array]) -> None:
    for kind, state in zip(_STATES, states, strict=False):
        if state is not None:
            arrays[f"{name}.{kind}"] = state


def _states(name: str, arrays: dict[str, mx.array]) -> tuple[mx.array | None, mx.array | None]:
    conv, matrix = (arrays.get(f"{name}.{kind}") for kind in _STATES)
    return conv, matrix


def _put_drafts(session: Timeline, marks: Sequence[Mark], arrays: dict[str, mx.array]) -> dict[str, Any] | None:
    """Adds what the model's own MTP head knew at each mark and knows now; -> what that is, None: nothing.

    A draft model has something too, but which model that is no file says.
    """
    head, drafters, points = session.model.mtp, [], []
    for number, snapshot in enumerate([*(mark.snapshot for mark in marks), session.cache.snapshot()]):
        drafter, mark = snapshot.draft or (None, None)
        if not isinstance(drafter, HeadDrafter) or drafter.head is not head:
            points.append(None)
            continue
        if drafter not in drafters:
            drafters.append(drafter)
        held, waiting, covered = mark
        points.append({"drafter": drafters.index(drafter), "held": held, "covered": covered})
        if waiting:
            tokens, hidden, positions = Taken.joined(waiting)
            parts = tokens.astype(mx.uint32), hidden, positions.astype(mx.uint32)
            arrays |= {f"drafts.{number}.{kind}": part for kind, part in zip(Taken._fields, parts, strict=True)}
    if not drafters:
        return None
    layers = [_put_layers(drafter.settled(), f"drafters.{number}", arrays) for number, drafter in enumerate(drafters)]
    return {"head": fingerprint_of_head(head), "layers": layers, "points": points}


def _drafts(
    kept: dict[str, Any] | None, arrays: dict[str, mx.array], model: Model, cache: Cache
) -> dict[int, tuple[HeadDrafter, Any]]:
    """What `_put_drafts` put, by the number of the mark; now comes after them. Nothing if the model lacks that head."""
    if kept is None or model.mtp is None or kept["head"] != fingerprint_of_head(model.mtp):
        return {}
    drafters = [
        HeadDrafter(model, cache, Pace(MOST), model.mtp, _layers(layers, f"drafters.{number}", arrays))
        for number, layers in enumerate(kept["layers"])
    ]
    found = {}
    for number, point in enumerate(kept["points"]):
        if point is None:
            continue
        waiting = ()
        if f"drafts.{number}.hidden" in arrays:
            tokens, hidden, positions = (arrays[f"drafts.{number}.{kind}"] for kind in Taken._fields)
            waiting = (Taken(tokens.astype(mx.int32), hidden, positions.astype(mx.int32)),)
        found[number] = drafters[point["drafter"]], (point["held"], waiting, point["covered"])
    return found
