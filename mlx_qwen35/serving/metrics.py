"""Counters of a server, as Prometheus reads them.

Knows counts, and how they are written. Knows nothing of how requests are answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_qwen35.serving.exchange import Usage
    from mlx_qwen35.serving.pool import Pool

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BOUNDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)  # seconds
_MOST_PATHS = 64  # another path than these is counted as "other"


class Metrics:
    """What was counted since the server began. Used on its event loop only."""

    def __init__(self) -> None:
        self._requests: Counter[tuple[str, int]] = Counter()
        self._tokens: Counter[str] = Counter()
        self._first = [0] * (len(_BOUNDS) + 1)
        self._first_seconds = 0.0

    def request(self, path: str, status: int) -> None:
        """One that has ended. status: 499 where the client went away before."""
        known = {each for each, _ in self._requests}
        self._requests[path if path in known or len(known) < _MOST_PATHS else "other", status] += 1

    def answered(self, usage: Usage, first: float | None) -> None:
        """Tokens of a request. first: seconds until its first token; None: there was none."""
        self._tokens["prompt"] += usage.prompt_tokens
        self._tokens["cached"] += usage.cached_tokens
        self._tokens["answer"] += usage.answer_tokens
        if first is not None:
            self._first[sum(first > bound for bound in _BOUNDS)] += 1
            self._first_seconds += first

    def text(self, pool: Pool) -> str:
        """All of it, and what the models of a pool do at this moment."""
        lines: list[str] = []

        def told(name: str, kind: str, what: str, values: Iterable[tuple[Mapping[str, object], float]]) -> None:
            lines.extend((f"# HELP mlx_qwen35_{name} {what}", f"# TYPE mlx_qwen35_{name} {kind}"))
            lines.extend(f"mlx_qwen35_{name}{_labels(labels)} {value:g}" for labels, value in values)

        requests = [({"path": path, "status": status}, n) for (path, status), n in sorted(self._requests.items())]
        told("requests_total", "counter", "Requests that have ended.", requests)
        for kind, what in (
            ("prompt", "Tokens of prompts, cached ones too."),
            ("cached", "Tokens of prompts that were not computed."),
            ("answer", "Tokens of answers."),
        ):
            told(f"{kind}_tokens_total", "counter", what, [({}, self._tokens[kind])])
        name = "mlx_qwen35_first_token_seconds"
        lines += [f"# HELP {name} From the request to its first token.", f"# TYPE {name} histogram"]
        total = 0
        for bound, count in zip([*map(str, _BOUNDS), "+Inf"], self._first, strict=True):
            total += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
        lines += [f"{name}_sum {self._first_seconds:g}", f"{name}_count {total}"]
        running = [({"model": place.name}, place.loaded) for place in pool.places if place.loaded is not None]
        told("models_loaded", "gauge", "Models in memory.", [({}, len(running))])
        rows = pool.how.parallel
        told(
            "requests_running", "gauge", "Answers that have a row.",
            [(labels, min(each.engine.running, rows)) for labels, each in running],
        )  # fmt: skip
        told(
            "requests_waiting", "gauge", "Answers that wait for a row.",
            [(labels, max(0, each.engine.running - rows)) for labels, each in running],
        )  # fmt: skip
        told("weight_bytes", "gauge", "Memory of weights.", [(labels, each.nbytes) for labels, each in running])
        told(
            "cache_bytes_most", "gauge", "What caches may take.",
            [(labels, each.engine.cache_bytes or 0) for labels, each in running],
        )  # fmt: skip
        told(
            "cache_bytes", "gauge", "What caches took when an answer last began or ended.",
            [(labels, each.engine.held_bytes) for labels, each in running],
        )  # fmt: skip
        streamed = [(labels, each.model.expert_stats) for labels, each in running]
        told(
            "expert_hit_ratio", "gauge", "Experts that were in memory when they were needed.",
            [(labels, stats.hit_rate) for labels, stats in streamed if stats is not None],
        )  # fmt: skip
        return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, object]) -> str:
    if not labels:
        return ""
    escaped = ((k, str(v).replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for k, v in labels.items())
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"
