"""Whether a written folder is what its conversion was to write: read again, held against the source, and asked.

Knows a plan, the checksums taken while it was carried out, and the folder as a loader finds it. Changes nothing. Three
looks, each at what the one before cannot see:

    bytes     every tensor's bytes on the disk against the checksums of what was computed
    weights   every tensor, found by its name as a loader finds it, against the source: bit by bit where it went over as
              it was, by the size of the error where it was quantized
    logits    of both on a text, one layer in memory at a time
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_qwen35.checkpoint.companions import small_files
from mlx_qwen35.checkpoint.load import compute_dtype
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.conversion import layerwise, pipeline
from mlx_qwen35.conversion.loss import most
from mlx_qwen35.conversion.piece import Piece
from mlx_qwen35.conversion.plan import Plan, make_plan
from mlx_qwen35.conversion.task import Task
from mlx_qwen35.conversion.write import WriteError, shown_size
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.text.tokenizer import Tokenizer

_TOKENS = 64
_TEXT = (
    "The quick brown fox jumps over the lazy dog. def area(radius): return 3.14159 * radius ** 2\n"
    "Der Rhein entspringt in den Alpen und mündet in die Nordsee. 日本の首都は東京です。 "
    "17 + 25 = 42; x^2 - 1 = (x - 1)(x + 1)."
)

Count = Callable[[int], None]


@dataclass(frozen=True)
class Verification:
    """What was found. tensors, nbytes: read back. exact, quantized: how many of our tensors went over bit by bit, and
    how many were quantized anew; worst: of the latter, the name and relative error (RMS) of the one with the largest.

    tokens: of the text whose logits were compared. difference: the largest of their absolute differences; divergence:
    the mean KL(source || target) in nats; agreement: for how much of the text both have the same likeliest token.
    """

    tensors: int
    nbytes: int
    exact: int
    quantized: int
    worst: tuple[str, float] | None
    tokens: int
    difference: float
    divergence: float
    agreement: float

    def __str__(self) -> str:
        lines = [
            f"read back: {self.tensors:,} tensors, {shown_size(self.nbytes)}, all as they were written",
            f"weights: {self.exact:,} bit by bit the source's, {self.quantized:,} quantized",
        ]
        if self.worst:
            lines[1] += f", the largest relative error {self.worst[1]:.3f} ({self.worst[0]})"
        same = "equal to the source's" if self.difference == 0 else f"differ by at most {self.difference:.3g}"
        lines.append(
            f"logits of {self.tokens} tokens: {same}, KL {self.divergence:.2e} nats, "
            f"same likeliest token {self.agreement:.0%}"
        )
        return "\n".join(lines)


def check_memory(origin: Source) -> None:
    """Raises CheckpointError where not even one layer of the source fits into this machine's memory."""
    needed = 2 * layerwise.largest(origin, compute_dtype(None))  # and once more while it is cast
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > there:
        raise CheckpointError(
            f"verifying needs one layer of {origin.folder} in memory, {needed / 1e9:.1f} GB, and this machine has "
            f"{there / 1e9:.1f} GB: convert without verify; every piece has a checksum anyway"
        )


def verify(plan: Plan, folder: Path, pieces: list[Piece], sums: Mapping[str, list[str]], count: Count) -> Verification:
    """Hold the `folder` that was written for a plan against its source. sums: by the names of the pieces; count: called
    with the bytes, in terms of the source, of every piece that was looked at, twice.

    Raises WriteError where the disk does not give back what was written, CheckpointError where a weight is not the
    source's, or a logit is none.
    """
    _check_bytes(pieces, sums, count)
    made = open_source(folder)
    errors = _check_weights(plan, make_plan(made, None, None, None), pieces, count)
    tokens = _tokens(plan.origin)
    compute = compute_dtype(None)
    ours, theirs = (layerwise.logits(source, tokens, compute) for source in (made, plan.origin))
    difference = mx.abs(ours - theirs).max().item()
    if not math.isfinite(difference):
        raise CheckpointError(f"{folder} gives logits that are no numbers, or {plan.origin.folder} does")
    if difference and all(task.is_same for task in plan.text):
        raise CheckpointError(f"{folder} has the weights of {plan.origin.folder}, but logits {difference:.3g} apart")
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (theirs, ours))
    return Verification(
        tensors=sum(len(specs) for specs in plan.files.values()),
        nbytes=plan.nbytes,
        exact=len(plan.tasks) - len(errors),
        quantized=len(errors),
        worst=max(errors.items(), key=lambda item: item[1]) if errors else None,
        tokens=tokens.size,
        difference=difference,
        divergence=(mx.exp(p) * (p - q)).sum(axis=-1).mean().item(),
        agreement=(ours.argmax(axis=-1) == theirs.argmax(axis=-1)).astype(mx.float32).mean().item(),
    )


def _check_bytes(pieces: list[Piece], sums: Mapping[str, list[str]], count: Count) -> None:
    for file in {id(piece.file): piece.file for piece in pieces}.values():
        file.forget()

    def compare(piece: Piece, found: list[str]) -> None:
        if found != sums[piece.name]:
            raise WriteError(
                f"{piece.task.name} in {piece.file.path.name} does not read back as it was written: the disk or its "
                "memory is damaged. Check it"
            )
        count(piece.nbytes)

    pipeline.run(pieces, Piece.found, compare)


def _check_weights(plan: Plan, made: Plan, pieces: list[Piece], count: Count) -> dict[str, float]:
    """The relative error (RMS) of every tensor that was quantized, by our names."""
    written = {task.name: task for task in made.tasks}
    squares: dict[str, np.ndarray] = {}

    def look(piece: Piece) -> np.ndarray | None:
        task, other = piece.task, written[piece.task.name]
        if task.has and not task.carried:
            return _squares(task, other, piece.start, piece.stop)
        for kind, data in task.make(piece.start, piece.stop)[0].items():
            if other.parts[kind].fetch(piece.start, piece.stop).tobytes() != data:
                raise CheckpointError(
                    f"{other.parts[kind].entries[0]} is not what {task.parts[kind].entries[0]} becomes: this is a "
                    "fault of the conversion, please report it"
                )
        return None

    def add(piece: Piece, found: np.ndarray | None) -> None:
        if found is not None:
            squares[piece.task.name] = squares.get(piece.task.name, 0) + found
        count(piece.nbytes)

    pipeline.run(pieces, look, add)
    errors = {name: math.sqrt(lost / max(whole, 1e-30)) for name, (lost, whole) in squares.items()}
    for task in plan.tasks:
        if task.name in errors and errors[task.name] > most(task.has):
            raise CheckpointError(
                f"{task.name} lost {errors[task.name]:.0%} of its size where {task.has.bits} bits lose far less: its "
                "values are no normal weights, or this is a fault of the conversion"
            )
    return errors


def _squares(task: Task, other: Task, start: int, stop: int) -> np.ndarray:
    """The sum of squares of what quantizing lost of some rows, and of what they are."""
    before, after = task.values(start, stop), other.values(start, stop)
    found = mx.stack([mx.square(before - after).sum(), mx.square(before).sum()])
    return np.array(found).astype(np.float64)


def _tokens(origin: Source) -> mx.array:
    """[1, T] of a text in several languages; of anything, where there is no tokenizer for it."""
    size = origin.config.text.vocab_size
    try:
        tokens = [token for token in Tokenizer.from_folder(small_files(origin.folder)).encode(_TEXT) if token < size]
    except CheckpointError:
        tokens = []
    if len(tokens) < 16:
        tokens = np.random.default_rng(0).integers(0, size, _TOKENS).tolist()
    return mx.array([tokens[:_TOKENS]])
