"""Whether streamed experts give the resident model's logits bit for bit: every pool size, thousands of steps.

    python benchmarks/exactness.py [--steps 1000] [--interrupts] [--models demo random-4bit random-float] [--out FILE]

For each model and each number of slots, from what one token asks for to all, the same tokens are decoded that the
resident model decoded, and every logit is compared. The demo's tokens are its own greedy answer to a question, from
then on random ones; the random models' are random. Every 250 steps a new conversation begins, with a prompt of 70.
--interrupts: while it decodes, Ctrl-C is pressed by the clock at random moments; a step that it hits is made again on
the same cache. Leaves with 1 at the first bit that differs.
Knows the public calls of the package. Prints one JSON line a model (or appends it to FILE), as METHODOLOGY.md says.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import circumstances, write  # noqa: E402
from mlx_qwen35.cache import Cache  # noqa: E402
from mlx_qwen35.checkpoint.load import load_model  # noqa: E402
from mlx_qwen35.conversion.convert import convert  # noqa: E402
from mlx_qwen35.experts.budget import StreamPlan  # noqa: E402
from mlx_qwen35.generation import prefill  # noqa: E402
from mlx_qwen35.library import demo_folder  # noqa: E402
from mlx_qwen35.model import Model  # noqa: E402
from tests.checkpoints import random_tensors, tiny_config, write_checkpoint  # noqa: E402

MODELS = ("demo", "random-4bit", "random-float")
CONVERSATION, PROMPT = 250, 70
RANDOM = {"num_experts": 12, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "hidden_size": 64,
          "shared_expert_intermediate_size": 32, "num_hidden_layers": 4}  # fmt: skip


class Alarm:
    """Presses Ctrl-C at random moments, on average every `pause` seconds, while it is on; 0: never."""

    def __init__(self, pause: float):
        self._pause, self._rng = pause, random.Random(0)
        signal.signal(signal.SIGALRM, self._press)

    def on(self) -> None:
        if self._pause:
            signal.setitimer(signal.ITIMER_REAL, max(1e-5, self._rng.random() * 2 * self._pause))

    @staticmethod
    def off() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)

    @staticmethod
    def _press(number: int, frame: object) -> None:
        raise KeyboardInterrupt


@dataclass
class Outcome:
    steps: int = 0
    interrupts: int = 0
    misses: int = 0
    hits: int = 0


def conversations(steps: int, vocabulary: int) -> list[tuple[list[int], list[int]]]:
    """(prompt, tokens that are decoded after it), drawn once for all pool sizes."""
    rng = np.random.default_rng(0)
    counts = [min(CONVERSATION, steps - start) for start in range(0, steps, CONVERSATION)]
    return [tuple(rng.integers(0, vocabulary, n).tolist() for n in (PROMPT, count)) for count in counts]


def decode(model: Model, prompt: list[int], tokens: list[int], alarm: Alarm, outcome: Outcome) -> list[bytes]:
    """The logits after the prompt and after each token. The prompt is read token by token, as decoding is exact."""
    cache, found = model.make_cache(), []
    prefill(model, prompt[:-1], cache, chunk_size=PROMPT)
    for token in (prompt[-1], *tokens):
        found.append(step(model, cache, token, alarm, outcome))
        outcome.steps += 1
    return found


def step(model: Model, cache: Cache, token: int, alarm: Alarm, outcome: Outcome) -> bytes:
    while True:
        before = cache.snapshot()
        try:
            alarm.on()
            logits = model(mx.array([[token]]), cache)
            mx.eval(logits, cache.arrays())
            alarm.off()
            return np.array(logits).tobytes()
        except KeyboardInterrupt:
            outcome.interrupts += 1
            cache.restore(before)
        finally:
            alarm.off()


def check(name: str, folder: Path, steps: int, alarm: Alarm, say: Callable[[str], None]) -> dict[str, object]:
    """A record; raises AssertionError at the first difference."""
    start = time.perf_counter()
    resident = load_model(folder)
    text = resident.config.text
    work = conversations(steps, min(text.vocab_size, 80 if name != "demo" else text.vocab_size))
    silent, layers = Alarm(0), text.num_hidden_layers
    expected = [decode(resident, prompt, tokens, silent, Outcome()) for prompt, tokens in work]
    total = Outcome()
    sizes = range(text.moe.experts_per_token, text.moe.num_experts + 1)
    for slots in sizes:
        plan = StreamPlan((slots,) * layers, group=2, chunk=PROMPT, tile=PROMPT, cache_limit=1 << 26, memory=1 << 31)
        model, outcome = load_model(folder, stream=plan), Outcome()
        for (prompt, tokens), right in zip(work, expected, strict=True):
            found = decode(model, prompt, tokens, alarm, outcome)
            wrong = [number for number, pair in enumerate(zip(found, right, strict=True)) if pair[0] != pair[1]]
            assert not wrong, f"{name}, {slots} slots: other bits from step {wrong[0]} on"
        stats = model.expert_stats
        model.unload()
        hits, misses = (stats.hits, stats.misses) if stats else (0, 0)
        say(f"{name}: {slots} slots, {outcome.steps} steps equal, {misses} misses, {outcome.interrupts} interrupts")
        for field, more in (("steps", outcome.steps), ("interrupts", outcome.interrupts), ("misses", misses)):
            setattr(total, field, getattr(total, field) + more)
        total.hits += hits
    return {
        "benchmark": "exactness", "model": name, "slots": [sizes[0], sizes[-1]], "logits": text.vocab_size,
        "seconds": time.perf_counter() - start, **vars(total),
    }  # fmt: skip


def folder_of(name: str, made: Path) -> Path:
    if name == "demo":
        return demo_folder()
    config = tiny_config("moe", **RANDOM)
    source = write_checkpoint(made / f"{name}-source", config, random_tensors(config))
    return source if name == "random-float" else convert(source, made / name, bits=4, group_size=32)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=1000, help="of each pool size")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--interrupts", action="store_true")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    around, alarm = circumstances(), Alarm(0.02 if args.interrupts else 0)
    with tempfile.TemporaryDirectory() as made:
        records = [
            check(name, folder_of(name, Path(made)), args.steps, alarm, lambda line: print(line, file=sys.stderr))
            for name in args.models
        ]
    write(records, around, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
