"""What a model takes and whether it fits: figures, and how they are shown.

Knows sums and words. How the figures come about is estimating.py's and footprint.py's.
"""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from numbers import Integral
from typing import Any

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library.footprint import WeightBytes, cache_at
from mlx_qwen35.library.macs import SIZES, kept_by_gpu, mac_for
from mlx_qwen35.library.speed import Expected

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(?P<number>\d{1,30}(?:\.\d{1,30})?)\s*(?P<unit>[kmgt]?i?)(?P<bytes>b?)", re.IGNORECASE)
_MOST = 2**60


@dataclass(frozen=True)
class Streaming:
    """How experts are streamed where not all of them fit. expert_bytes: of one in memory, for each layer that has them.

    needed: the least memory with which it works; plan: None if there is less. expected: how fast, where it was probed.
    """

    context_length: int
    num_experts: int
    experts_per_token: int
    expert_bytes: tuple[int, ...]
    needed: int
    plan: StreamPlan | None
    expected: Expected | None = None

    @property
    def pool(self) -> int:
        """Bytes of all slots."""
        slots = self.plan.slots if self.plan else ()
        return sum(count * size for count, size in zip(slots, self.expert_bytes, strict=False))

    @property
    def share(self) -> float:
        """Of all experts, how many are in memory at once."""
        return self.pool / (self.num_experts * sum(self.expert_bytes))

    @property
    def chunk_bytes(self) -> int:
        """Read from the disk for each chunk of a prompt: every expert of the layers that are not resident."""
        slots = self.plan.slots if self.plan else ()
        sizes = zip(slots, self.expert_bytes, strict=False)
        return self.num_experts * sum(size for count, size in sizes if count < self.num_experts)

    @property
    def token_bytes(self) -> int:
        """Read for a token whose experts are all to be read."""
        return self.experts_per_token * sum(self.expert_bytes)

    def as_dict(self) -> dict[str, Any]:
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        record |= {name: getattr(self, name) for name in ("pool", "share", "chunk_bytes", "token_bytes")}
        record |= {"plan": vars(self.plan) if self.plan else None}
        return record | {"expected": self.expected.as_dict() if self.expected else None}

    def lines(self, memory: int) -> list[str]:
        if self.plan is None:
            lack = shown_size(self.needed - memory)
            return [
                f"  Nor with experts streamed from the disk: {shown_size(self.needed)} are needed with "
                f"{self.experts_per_token} experts a layer in memory and {self.context_length:,} tokens, {lack} more."
            ]
        slots, layers = self.plan.slots, len(self.plan.slots)
        few, many = min(slots), max(slots)
        count = f"{few}" if few == many else f"{few} or {many}"
        lines = [
            f"  {how_streamed(self.plan)}, with up to {self.context_length:,} tokens:",
            _line("slots", self.pool, f"{count} of {self.num_experts} experts in each of {layers} layers, "
                  f"{self.share:.0%}, {shown_size(self.pool // layers)} a layer"),
            _line("token", self.token_bytes, "if none of its experts is in memory"),
            _line("chunk", self.chunk_bytes, f"read for every {self.plan.chunk:,} tokens of a prompt"),
        ]  # fmt: skip
        return lines + (self.expected.lines(self.plan.chunk) if self.expected else [])


@dataclass(frozen=True)
class Plan:
    """What a model needs in memory, all weights resident, at the peak of one conversation of context_length tokens, all
    of them in one prompt; pictures are not in it. All sizes in bytes, all lengths in tokens.

    name: what was asked for; quantization: in words; dtype: computed in. weights: by role. loading: what reading them
    takes besides, for a moment. process: Python, MLX and the tokenizer. snapshots: states that a session
    goes back to. cache_per_token, cache_constant: of one conversation. working: to read a prompt of context_length.
    longest_context: the most that fits into memory, 0 if none does; most_context: that the model has. memory: what
    there is, and memory_source where that was found. streaming: what is done where that is too little for a model with
    experts. converted: the same as a conversion to 4 bits would have it, where this is not MLX's quantization yet.
    drafting: of what drafts tokens, with its own cache, at context_length; 0 where nothing does. streamable: whether
    experts can stay on the disk as the checkpoint has them.
    """

    name: str
    quantization: str
    dtype: str
    parameters: int
    weights: WeightBytes
    loading: int
    process: int
    snapshots: int
    cache_per_token: int
    cache_constant: int
    context_length: int
    working: int
    longest_context: int
    most_context: int
    memory: int
    memory_source: str
    streaming: Streaming | None = None
    converted: Plan | None = None
    drafting: int = 0
    streamable: bool = True

    @property
    def cache(self) -> int:
        """At context_length."""
        return cache_at(self.context_length, self.cache_per_token, self.cache_constant)

    @property
    def needed(self) -> int:
        """At context_length."""
        running = self.cache + self.drafting + self.working
        return self.weights.total + self.process + self.snapshots + max(running, self.loading)

    @property
    def fits(self) -> bool:
        """Whether context_length tokens fit into memory."""
        return self.needed <= self.memory

    @property
    def missing(self) -> int:
        """By how much they do not; 0 where they fit."""
        return max(0, self.needed - self.memory)

    @property
    def mac(self) -> int | None:
        """Memory in GB of the smallest Mac that has room for `needed`; None where none has."""
        return mac_for(self.needed)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields and what follows from them."""
        record = {name: getattr(self, name) for name in self.__dataclass_fields__}
        record["weights"] = {**vars(self.weights), "total": self.weights.total}
        record |= {name: getattr(self, name) for name in ("cache", "needed", "fits", "missing", "mac")}
        record["streaming"] = self.streaming.as_dict() if self.streaming else None
        record["converted"] = self.converted.as_dict() if self.converted else None
        return record

    def __str__(self) -> str:
        weights = self.weights
        roles = ", ".join(
            f"{name} {shown_size(getattr(weights, name))}"
            for name in ("experts", "trunk", "embedding", "vision")
            if getattr(weights, name)
        )
        tokens, a_token = f"{self.context_length:,} tokens", shown_size(self.cache_per_token)
        lines = [
            f"{self.name}: {_count(self.parameters)} parameters, {self.quantization}, computed in {self.dtype}",
            _line("weights", weights.total, f"in memory all the time: {roles}"),
            _line("cache", self.cache, f"at {tokens}: {a_token} a token and {shown_size(self.cache_constant)}"),
            _line("prompt", self.working, "at most, while one of that length is read"),
            _line("states", self.snapshots, "to go back to in a session"),
            _line("process", self.process, "Python, MLX and the tokenizer"),
            _line("needed", self.needed, f"at the peak, for {tokens} of one conversation without pictures"),
            _line("memory", self.memory, self.memory_source),
            self._verdict(),
        ]
        if self.drafting:
            lines.insert(3, _line("drafts", self.drafting, "what drafts tokens, with its own cache"))
        elif weights.mtp:
            lines.insert(2, _line("MTP", weights.mtp, "on the disk; read with --mtp, and not counted here"))
        if self.streaming:
            lines += self.streaming.lines(self.memory)
        elif not self.streamable and not self.fits:
            lines.append("  Experts cannot be streamed from the disk in this form: convert the model first.")
        lines += [*self._mac(), *self._ceiling()]
        if made := self.converted:
            streaming = made.streaming.lines(self.memory) if made.streaming else []
            lines.append(
                f"  Converted to 4 bits (`mlx-qwen35 convert {self.name} TARGET -q`): weights "
                f"{shown_size(made.weights.total)}."
            )
            lines += [f"  {line}" for line in (made._verdict(), *streaming, *made._mac())]
        return "\n".join(lines)

    def _mac(self) -> list[str]:
        """Which Mac has room for it: the system leaves a GPU a part of its memory."""
        if self.mac is None:
            return ["  No Mac has room for all of that."]
        kept = shown_size(kept_by_gpu(self.mac))
        return [f"  A Mac with {self.mac} GB has room for all of that: macOS lets its GPU keep about {kept}."]

    def _ceiling(self) -> list[str]:
        """What a ceiling of as many GB as Macs are sold with is on such a Mac."""
        gigabytes = round(self.memory / 1e9)
        if self.memory_source != "given" or gigabytes not in SIZES or kept_by_gpu(gigabytes) >= self.memory:
            return []
        return [
            f"  {shown_size(self.memory)} for this process is more than a Mac with {gigabytes} GB has to give, about "
            f"{shown_size(kept_by_gpu(gigabytes))}: for such a Mac give --mac {gigabytes}GB."
        ]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

    def _verdict(self) -> str:
        if not self.longest_context:
            lack = shown_size(self.missing)
            all_there = " with all experts in memory" if self.streaming and self.streaming.plan else ""
            return f"  Does not fit: {lack} more memory is needed for {self.context_length:,} tokens{all_there}."
        whole = self.longest_context == self.most_context
        most = f"{self.longest_context:,} tokens" + (", all that the model has" if whole else "")
        if not self.fits:
            lack = f"{self.context_length:,} tokens do not fit: {shown_size(self.missing)} more memory is needed"
            return f"  {lack}; up to {most} do."
        return f"  Fits, up to {most}."


def parse_size(text: str | int | float, *, fewest: int = 1) -> int:
    """A size in bytes: a number, or a text such as "24GB" (10^9) or "24 GiB" (2^30).

    Raises ArgumentError otherwise. fewest: less bytes than that, without a unit, are a unit that was forgotten: the
    error asks whether "24GB" is meant.
    """
    bare = isinstance(text, (Integral, float)) and not isinstance(text, bool)
    told = f"{text:f}" if isinstance(text, float) else str(text).strip()
    found = _SIZE.fullmatch(told) if bare or isinstance(text, str) else None
    unit = found["unit"].lower() if found else ""
    if not found or unit == "i":
        raise ArgumentError(f"{text!r} is no size: {_HOW_TO}")
    number = int(found["number"]) if found["number"].isdigit() else float(found["number"])
    size = int(number * _UNITS[unit])
    forgotten = not unit and not found["bytes"] and 0 < number < fewest
    if forgotten:
        meant = f"{number}{'GB' if number < 1024 else 'MB'}"
        raise ArgumentError(f"{text!r} would be {number} bytes: did you mean {meant!r}? Write a unit")
    if not 0 < size < _MOST:
        raise ArgumentError(f"{text!r} is no size: {_HOW_TO}")
    return size


_HOW_TO = "write bytes, or a number and KB, MB, GB, TB (KiB, MiB, GiB, TiB)"


def how_streamed(plan: StreamPlan) -> str:
    """In words, what a plan does with experts."""
    if len(plan.slots) * max(plan.slots) - sum(plan.slots) == 1 and plan.slots[-1] < plan.slots[0]:
        return f"All experts but one stay in memory, and a prompt is read {plan.chunk:,} tokens at a time"
    return "Experts are streamed from the disk"


def _line(label: str, size: int, remark: str) -> str:
    return f"  {label:8} {shown_size(size):>9}   {remark}"


def shown_size(size: int) -> str:
    """Bytes as people read them, in powers of ten."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} B"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
