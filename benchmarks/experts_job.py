"""A measured process of benchmarks/experts.py: one model, loaded and run by one of the two.

    python benchmarks/experts_job.py '{"side": "ours", ...}'

Prints what it measured as a line of JSON. Knows the public calls of both, and how files are forgotten and read again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from mlx_qwen35.machine.files import forget  # noqa: E402

VOCABULARY = 16384  # the published 248,320 would take time in the head and none in the experts
Run = dict[str, Any]


def run_here(job: Run) -> Run:
    """What the process of a job does and reports; `start` is the clock from before it was started."""
    import mlx.core as mx

    step, model = (_ours if job["side"] == "ours" else _theirs)(job)
    found: Run = {"ready": time.time() - job["start"], "held": mx.get_active_memory()}
    rng = np.random.default_rng(job["seed"])
    frequency = 1 / np.arange(1, VOCABULARY + 1) ** job["zipf"]
    tokens = rng.choice(VOCABULARY, size=1 << 14, p=frequency / frequency.sum()).tolist()
    if job["prompt"]:
        if job["cold"]:
            drop_pages(job["folder"])
        found |= step.prompt(tokens[: job["prompt"]])
    else:
        found |= step.decode(tokens, job["settle"], job["tokens"], job["folder"])
    return found


class _Forced:
    """A sampler that draws the given tokens, and like any other only when it knows the logits."""

    def __init__(self, tokens: list[int]):
        self._tokens = iter(tokens)

    def __call__(self, logits: Any, history: object = None) -> Any:
        import mlx.core as mx

        token = next(self._tokens) + 0 * mx.argmax(logits, axis=-1)
        return token if history is None else (token, logits)

    def append(self, token: object) -> None:
        """As a history: nothing is kept."""


def _decode(steps: Iterator[object], count: Callable[[], dict[str, int]], settle: int, tokens: int,
            folder: str) -> Run:  # fmt: skip
    """Seconds of each token, warm and cold, and what was counted in them. folder: of the files they are read from."""
    for _ in range(settle):
        next(steps)
    warm_pages(folder)
    found: Run = {}
    for name, before in {"warm": lambda: None, "cold": lambda: drop_pages(folder)}.items():
        seconds, counted = [], count()
        for _ in range(tokens):
            before()
            start = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - start)
        found[name] = {"seconds": sum(seconds) / tokens, "median": sorted(seconds)[tokens // 2]}
        found[name] |= {key: (value - counted[key]) / tokens for key, value in count().items()}
    return found


def _ours(job: Run) -> tuple[Any, Any]:
    from mlx_qwen35.checkpoint.load import load_model

    if job["slots"]:
        from mlx_qwen35.experts.budget import StreamPlan

        plan = StreamPlan((job["slots"],) * job["layers"], group=32, chunk=2048, tile=512, cache_limit=256 << 20,
                          memory=0)  # fmt: skip
        model = load_model(job["folder"], stream=plan)
    else:
        model = load_model(job["folder"])
    return OurSteps(model), model


class OurSteps:
    def __init__(self, model: Any):
        self.model = model

    def count(self) -> dict[str, int]:
        stats = self.model.expert_stats
        names = ("hits", "misses", "prefetched", "prefetch_hits", "bytes_read", "wait_seconds")
        return {name: getattr(stats, name) for name in names} if stats else {}

    def prompt(self, tokens: list[int]) -> Run:
        import mlx.core as mx

        from mlx_qwen35.generation import prefill

        start = time.perf_counter()
        mx.eval(prefill(self.model, tokens, self.model.make_cache()))
        return {"prompt": {"seconds": time.perf_counter() - start} | self.count()}

    def decode(self, tokens: list[int], settle: int, count: int, folder: str) -> Run:
        from mlx_qwen35.generation import decode, prefill

        cache, forced = self.model.make_cache(), _Forced(tokens[4:])
        logits = prefill(self.model, tokens[:4], cache)
        steps = decode(self.model, cache, logits, forced, forced, max_tokens=len(tokens))
        return _decode(steps, self.count, settle, count, folder)


def _theirs(job: Run) -> tuple[Any, Any]:
    import mlx.core as mx
    from mlx_vlm.utils import load_model

    held = {"expert_cache_gb": job["slots"] * job["layers"] * job["expert_bytes"] / 1e9} if job["slots"] else {}
    model = load_model(Path(job["folder"]), **held)
    if mx.default_device() == mx.cpu:  # the precision that this package takes there by itself
        model.set_dtype(mx.float32)
        mx.eval(model.parameters())
    return TheirSteps(model), model


class TheirSteps:
    def __init__(self, model: Any):
        self.model = model

    def count(self) -> dict[str, int]:
        store = getattr(self.model, "moe_offload_store", None)
        return {name: store.stats()[name] for name in ("hits", "misses")} if store else {}

    def _steps(self, prompt: list[int], forced: list[int], most: int) -> Iterator[object]:
        import mlx.core as mx
        from mlx_vlm.generate.ar import generate_step

        return generate_step(mx.array([prompt]), self.model, None, None, max_tokens=most, sampler=_Forced(forced))

    def prompt(self, tokens: list[int]) -> Run:
        start = time.perf_counter()
        for _ in self._steps(tokens, [0, 0], 0):  # ends when the first token is known
            pass
        return {"prompt": {"seconds": time.perf_counter() - start} | self.count()}

    def decode(self, tokens: list[int], settle: int, count: int, folder: str) -> Run:
        return _decode(self._steps(tokens[:4], tokens[4:], len(tokens)), self.count, settle, count, folder)


def drop_pages(folder: str | Path) -> None:
    """Have the kernel forget what it holds of the files of a folder."""
    for path in sorted(Path(folder).rglob("*.safetensors")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            forget(descriptor)
        finally:
            os.close(descriptor)


def warm_pages(folder: str | Path) -> None:
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            block = bytearray(1 << 24)
            while file.readinto(block):
                pass


if __name__ == "__main__":
    print(json.dumps(run_here(json.loads(sys.argv[1]))))
