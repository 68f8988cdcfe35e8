"""Whether the engine stays as it is: thousands of requests with cancels, deadlines and faults, one after the other.

    python benchmarks/soak.py [--requests 2000] [--minutes 10] [--rows 8] [--seed 0]

Requests to the demo come from several threads, at most twice as many at a time as there are rows, spread over the
minutes: short and long prompts, many with a common beginning, pictures, sessions that go on, drafts, samplings, tools,
forms, stop strings, several answers. Some are cancelled at a random part, some have a deadline of moments, some have an
on_progress that raises, and of some the Answer is dropped unread.

Checked, or the exit status is 1: every answer ends (none is waited for longer than two minutes), with a finish_reason
that fits what was done to it, or with the very error that was planted; what has a form and ended by itself is JSON; no
row and no thread is left; resident memory in the last tenth of the time is within 3 % of that in the second; MLX holds
what it held before, once all is closed. Told beside it: whenever nothing moves for 12 seconds, what everybody waits
for.

Memory is compared at rest: forty times the clients hold back until no request is open, and forget their own
sessions, so that what is left is the model, the store of computed prompts, and what leaks. Each look comes after malloc
has given back what is free, and leaves out the buffers that MLX keeps; of a tenth the median counts. The looks between,
with rows of all kinds under way, are printed too: they go up and down by a tenth.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

import mlx.core as mx  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks.measuring import circumstances  # noqa: E402
from benchmarks.soak_watch import Memory, Watcher  # noqa: E402
from mlx_qwen35 import Engine, Sampling, Session, load  # noqa: E402

SYSTEMS = ("Answer in one word. " * 30, "You know sums. " * 60, None)
QUESTIONS = ("What is {} + 25?", "Sort these words: queen, jacket, {}", "Reverse these words: stone, kite, {}", "{}")
SCHEMA = {"type": "object", "properties": {"sum": {"type": "integer"}}, "required": ["sum"]}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"properties": {"a": {"type": "integer"}}}}}
_SESSION = 4 << 20  # bytes above which a session is forgotten
PATIENCE = 120.0  # seconds in which an answer has to end
EVERY = 5.0  # seconds between two looks at the memory
RESTS = 40  # looks at rest


class Planted(Exception):
    """A fault that was meant."""


class Gate:
    """Through which clients come while it is open."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open, self._inside = True, 0

    @contextmanager
    def through(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._open)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def closed(self, patience: float) -> Iterator[None]:
        """Nobody is inside, or was not within `patience` seconds."""
        with self._changed:
            self._open = False
            self._changed.wait_for(lambda: not self._inside, patience)
        try:
            yield
        finally:
            with self._changed:
                self._open = True
                self._changed.notify_all()


class Soak:
    """What was asked, and what came of it."""

    def __init__(self, engine: Engine, model: Any, seed: int) -> None:
        self.engine, self.counts, self.faults = engine, Counter(), []
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._sessions = [Session(model) for _ in range(4)]
        self._busy: set[int] = set()

    def request(self, number: int) -> None:
        """One request from its beginning to its end."""
        with self._lock:
            draw = random.Random(self._random.random())
        what = draw.choices(("read", "cancel", "deadline", "fault", "drop", "stream"), weights=(50, 18, 10, 8, 6, 8))[0]
        options = self._options(draw)
        session = None
        if "n" not in options and draw.random() < 0.2:
            session = self._session()
            options |= {} if session is None else {"session": self._sessions[session]}
        if what == "deadline":
            options["deadline"] = draw.uniform(0.001, 0.5)
        if what == "fault":
            options["on_progress"] = _fails(draw.randrange(2))
        question = draw.choice(QUESTIONS).format(draw.choice((number, "owl", "lamp " * draw.randrange(1, 60))))
        if draw.random() < 0.1:
            picture = Image.new("RGB", (draw.randrange(40, 120), draw.randrange(40, 120)), (number % 256, 80, 40))
            options["images"] = [picture]
        try:
            outcome = self._answered(draw, what, question, options)
        except Planted:
            outcome = "planted" if what == "fault" else "a fault of another"
        except Exception as error:  # what is not meant
            outcome = f"{type(error).__name__}: {error}"
        finally:
            if session is not None:
                with self._lock:
                    self._busy.discard(session)
                    if self._sessions[session].nbytes > _SESSION:  # callers' own, which no budget of the engine bounds
                        self._sessions[session].forget()
        self._judge(number, what, options, outcome)

    def forget(self) -> None:
        """What the callers hold themselves, while no request is open."""
        with self._lock:
            for session in self._sessions:
                session.forget()

    def _options(self, draw: random.Random) -> dict[str, Any]:
        made: dict[str, Any] = {"max_tokens": draw.randrange(0, 48), "system": draw.choice(SYSTEMS)}
        made["enable_thinking"] = draw.random() < 0.3
        made["priority"] = draw.randrange(2)
        if draw.random() < 0.5:
            made["sampling"] = Sampling(temperature=draw.uniform(0.3, 1.2), top_k=20, seed=draw.randrange(99))
        else:
            made["sampling"] = Sampling()
        for share, extra in (
            (0.1, {"response_format": SCHEMA, "max_tokens": 60}),
            (0.1, {"tools": [TOOL], "tool_choice": draw.choice(("auto", "required"))}),
            (0.15, {"stop": draw.choice(("a", "4", "</think>"))}),
            (0.1, {"n": draw.randrange(2, 4)}),
            (0.1, {"logprobs": True, "top_logprobs": draw.randrange(5)}),
            (0.1, {"thinking_budget": draw.randrange(6)}),
            (0.3, {"mtp": False}),
        ):
            if draw.random() < share:
                made |= extra
        return made

    def _session(self) -> int | None:
        with self._lock:
            free = [number for number in range(len(self._sessions)) if number not in self._busy]
            if not free:
                return None
            self._busy.add(free[0])
            return free[0]

    def _answered(self, draw: random.Random, what: str, question: str, options: dict[str, Any]) -> str:
        answer = self.engine.submit(question, **options)
        if what == "drop":
            held = "session" in options
            if held:  # whose next answer would find it in use
                answer.cancel()
                _end(answer)
            return "dropped"
        if what == "cancel":
            for _ in range(draw.randrange(12)):
                if next(answer, None) is None:
                    break
            answer.cancel()
        if what == "stream":
            for _ in answer:
                pass
        done = _end(answer)
        each = done if isinstance(done, list) else [done]
        if "response_format" in options and not options.get("stop") and "tools" not in options:  # or it may be a call
            for one in each:
                if one.finish_reason == "stop":
                    content = one.text.rpartition("</think>")[2]
                    json.loads(content)
        return ",".join(sorted({one.finish_reason for one in each}))

    def _judge(self, number: int, what: str, options: dict[str, Any], outcome: str) -> None:
        natural = {"stop", "length"}
        wanted = {
            "read": natural, "stream": natural, "cancel": natural | {"cancelled"}, "deadline": natural | {"deadline"},
            "fault": natural | {"planted"}, "drop": {"dropped"},
        }[what]  # fmt: skip
        with self._lock:
            self.counts[f"{what}: {outcome}"[:60]] += 1
            if not set(outcome.split(",")) <= wanted:
                self.faults.append(f"request {number} ({what}, {sorted(options)}): {outcome}")


def _fails(after: int) -> Any:
    calls = []

    def on_progress(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) > after:
            raise Planted(f"after {done} of {total} tokens")

    return on_progress


def _rested(engine: Engine) -> None:
    """Waits until no request is open, as long as there is patience."""
    until = time.monotonic() + PATIENCE
    while engine.running and time.monotonic() < until:
        time.sleep(0.01)


def _end(answer: Any) -> Any:
    return answer.result(timeout=PATIENCE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    around = circumstances()
    model, processor = load(mtp=True)
    mx.eval(model.parameters())
    before = mx.get_active_memory()
    begin, numbers, lock = time.monotonic(), iter(range(args.requests)), threading.Lock()
    engine = Engine(model, processor, most_rows=args.rows, cache_bytes=6 << 20)
    soak, watcher = Soak(engine, model, args.seed), Watcher(engine)
    gate = Gate()

    def client() -> None:
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return
            time.sleep(max(0.0, begin + 60 * args.minutes * number / args.requests - time.monotonic()))
            with gate.through():
                soak.request(number)

    clients = [threading.Thread(target=client) for _ in range(2 * args.rows)]
    for thread in clients:
        thread.start()
    memory, resting, looked, rests = Memory(), Memory(), 0, 0
    while any(thread.is_alive() for thread in clients):
        time.sleep(0.5)
        watcher.look()
        if time.monotonic() - begin >= 60 * args.minutes / RESTS * (rests + 1):
            rests += 1
            with gate.closed(PATIENCE):
                _rested(engine)
                soak.forget()
                gc.collect()
                size = resting.look()["trimmed"]
                print(f"{time.monotonic() - begin:5.0f} s: at rest {size / 1e6:.1f}", file=sys.stderr, flush=True)
        if time.monotonic() - begin >= EVERY * (looked + 1):
            sizes, looked = memory.look(), looked + 1
            if looked % 6 == 0:
                shown = ", ".join(f"{name} {size / 1e6:.1f}" for name, size in sizes.items())
                print(f"{EVERY * looked:5.0f} s: {shown} (millions)", file=sys.stderr, flush=True)
    _rested(engine)
    left, seconds = engine.running, time.monotonic() - begin
    window = seconds / 10
    busy = memory.between(window, 2 * window), memory.between(seconds - window, seconds)
    first, last = resting.between(window, 2 * window), resting.between(seconds - window, seconds)
    engine.close()
    soak.forget()
    gc.collect()
    mx.clear_cache()
    growth = last / first - 1 if first and last else float("nan")
    held = mx.get_active_memory() - before
    threads = [thread.name for thread in threading.enumerate() if "engine" in thread.name]
    print(f"{around['machine']}, {around['commit']}: {args.requests} requests in {seconds:.0f} s")
    for what, count in sorted(soak.counts.items()):
        print(f"  {count:5} {what}")
    for when, (earlier, later) in (("at rest", (first, last)), ("with rows under way", busy)):
        print(
            f"resident memory {when}: {(later or 0) / 1e6:.1f} MB in the last {window:.0f} s, "
            f"{(earlier or 0) / 1e6:.1f} MB in those after the first {window:.0f}"
        )
    print(f"growth at rest {100 * growth:+.1f} %")
    print(f"stood still {watcher.times} times; the loop's guard let a row go on {engine._worker.loop.went_on} times")
    print(f"rows left {left}, threads left {len(threads)}, MLX holds {held:,} bytes more than before")
    for fault in soak.faults[:20]:
        print("FAULT", fault)
    wrong = soak.faults or left or threads or not growth <= 0.03 or held > 1 << 20
    print("stays as it is" if not wrong else "does NOT stay as it is")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
