"""Several requests at a time in this package, an earlier build of it, mlx-lm and mlx-vlm: a process for each.

    with BatchSide("mlx-lm", folder) as side:
        side.answers(work, rows=8)          all requests, so many at a time: seconds, when each token came, tokens
        side.stall(running, late, quiet)    seconds between tokens of running rows, before a long prompt and meanwhile

    ours            generate_batch(most_rows=rows), in the caller's thread
    engine          Engine(most_rows=rows), on its own thread, one reader a request
    before          another checkout of this package: generate_batch, which pads and waits for its longest row; of one
                    row stream_generate, one request after the other
    mlx-lm, mlx-vlm their BatchGenerator with its defaults; a request is inserted when another has ended

As a program, `python benchmarks/batch_sides.py NAME FOLDER [CHECKOUT]` is such a process.
Knows the public calls of these projects. Draws no conclusions. Every answer has the length that is asked for: no token
ends one. Greedy. On the CPU all compute in float32 (sides.py).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
if len(sys.argv) > 3:  # as a program: another build takes this one's place
    sys.path[:0] = [sys.argv[3]]
    import mlx_qwen35  # noqa: F401
sys.path[1:1] = [str(CHECKOUT)]

from benchmarks import sides  # noqa: E402

_HURRY = 1000.0  # seconds of prompts for each second of steps
Work = Sequence[tuple[list[int], int]]  # (prompt, tokens of its answer), in the order in which they are asked


class BatchSide(sides.Side):
    """A process of one of NAMES with a checkpoint loaded. checkout: where "before" lies."""

    program = Path(__file__)

    def __init__(self, name: str, folder: Path, checkout: Path | None = None):
        super().__init__(name, folder, *([] if checkout is None else [str(checkout)]))

    def answers(self, work: Work, rows: int, hurry: bool = False) -> dict[str, Any]:
        """All of them, at most `rows` at a time. hurry: prompts need not be slow for those who answer meanwhile.

        "seconds" for all. "stamps": for each request the seconds when its tokens came; None where a side gives all at
        its end, then "prompted" is when the prompts were read. "tokens": each answer.
        """
        return self.send({"job": "answers", "work": work, "rows": rows, "hurry": hurry})

    def stall(self, running: Work, late: list[int], quiet: int) -> dict[str, Any]:
        """Rows run; once each has had `quiet` gaps between tokens, a prompt comes in, up to its first token.

        "quiet" and "busy": all those seconds between two tokens of one row. "first": of the prompt, to its token.
        """
        return self.send({"job": "stall", "running": running, "late": late, "quiet": quiet})


class _Stepped:
    """A generator that is stepped: mlx-lm's and mlx-vlm's."""

    def start(self) -> None:
        """A generator without requests."""

    def add(self, prompt: list[int], new: int) -> int:
        """Its name from now on."""
        raise NotImplementedError

    def step(self) -> Iterator[tuple[int, int, bool]]:
        """(name, token, whether it was the last) of each row that has one more."""
        raise NotImplementedError

    def drop(self, name: int) -> None:
        raise NotImplementedError

    def answers(self, work: Work, rows: int, hurry: bool) -> dict[str, Any]:
        self.start()
        waiting, names = deque(range(len(work))), {}
        stamps, tokens = [[] for _ in work], [[] for _ in work]
        begin = time.perf_counter()
        while waiting or names:
            while waiting and len(names) < rows:
                number = waiting.popleft()
                names[self.add(*work[number])] = number
            for name, token, last in self.step():
                number = names.pop(name) if last else names[name]
                stamps[number].append(time.perf_counter() - begin)
                tokens[number].append(token)
        return {"seconds": time.perf_counter() - begin, "stamps": stamps, "tokens": tokens}

    def stall(self, running: Work, late: list[int], quiet: int) -> dict[str, Any]:
        self.start()
        stamps: dict[int, list[float]] = {self.add(*request): [] for request in running}

        def step() -> None:
            made = list(self.step())
            now = time.perf_counter()
            for name, _, _ in made:
                stamps[name].append(now)

        while min(map(len, stamps.values())) <= quiet:
            step()
        begin, added = time.perf_counter(), self.add(late, 2)
        stamps[added] = []
        while not stamps[added]:
            step()
        (first,) = stamps.pop(added)
        for name in [*stamps, added]:
            self.drop(name)
        return _gaps([*stamps.values()], begin, first, quiet)


def _gaps(stamps: list[list[float]], begin: float, first: float, quiet: int) -> dict[str, Any]:
    """Of each row: the last `quiet` gaps that ended before `begin`, and those that ended from then up to `first`."""
    before, busy = [], []
    for row in stamps:
        gaps = [(now - then, now) for then, now in zip(row, row[1:], strict=False)]
        before += [gap for gap, now in gaps if now <= begin][-quiet:]
        busy += [gap for gap, now in gaps if begin < now <= first]
    return {"quiet": before, "busy": busy, "first": first - begin}


class _MlxLm(_Stepped):
    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_lm.utils import load_model

        self._model, _ = load_model(folder, lazy=True)
        sides.ready(self._model, mx)

    def start(self) -> None:
        from mlx_lm.generate import BatchGenerator

        self._generator = BatchGenerator(self._model)

    def add(self, prompt: list[int], new: int) -> int:
        return self._generator.insert([prompt], [new])[0]

    def step(self) -> Iterator[tuple[int, int, bool]]:
        for made in self._generator.next()[1]:
            yield made.uid, made.token, made.finish_reason is not None

    def drop(self, name: int) -> None:
        self._generator.remove([name])


class _MlxVlm(_Stepped):
    def __init__(self, folder: Path):
        import mlx.core as mx
        from mlx_vlm.utils import StoppingCriteria, load_model

        self._model = load_model(folder, lazy=True)
        sides.ready(self._model, mx)
        self.stopping_criteria = StoppingCriteria([], tokenizer=self)  # the only part of a tokenizer that is asked

    def start(self) -> None:
        from mlx_vlm.generate.ar import BatchGenerator

        self._generator = BatchGenerator(self._model.language_model, self, compute_logprobs=False)

    def add(self, prompt: list[int], new: int) -> int:
        import mlx.core as mx

        seen = self._model.get_input_embeddings(mx.array([prompt]), None, mask=None).to_dict()
        given = {name: array for name, array in seen.items() if array is not None}
        return self._generator.insert([prompt], [new], prompt_kwargs=[given])[0]

    def step(self) -> Iterator[tuple[int, int, bool]]:
        for made in self._generator.next()[1]:
            yield made.uid, int(made.token), made.finish_reason is not None

    def drop(self, name: int) -> None:
        self._generator.remove(name)


class _Ours:
    """What ours, engine and before share: the model, and a processor that knows no token that ends an answer."""

    def __init__(self, folder: Path):
        from mlx_qwen35.checkpoint.load import load_model
        from mlx_qwen35.library import demo_folder
        from mlx_qwen35.processor import Processor
        from mlx_qwen35.sampling import Sampling

        self._model = load_model(folder)
        whole = Processor.from_folder(demo_folder(), replace(self._model.config, vision=None))
        self._processor = replace(whole, eos_token_ids=frozenset())
        self._sampling = Sampling(temperature=0.0)

    def answers(self, work: Work, rows: int, hurry: bool) -> dict[str, Any]:
        from mlx_qwen35 import generate_batch

        begin = time.perf_counter()
        made = generate_batch(
            self._model,
            self._processor,
            [prompt for prompt, _ in work],
            max_tokens=[new for _, new in work],
            sampling=self._sampling,
            most_rows=rows,
        )
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "stamps": None, "tokens": [answer.tokens for answer in made]}


class _Before(_Ours):
    def answers(self, work: Work, rows: int, hurry: bool) -> dict[str, Any]:
        from mlx_qwen35 import generate_batch, stream_generate

        begin, prompted = time.perf_counter(), []
        if rows == 1:
            stamps, tokens = [[] for _ in work], [[] for _ in work]
            for number, (prompt, new) in enumerate(work):
                given = {"max_tokens": new, "sampling": self._sampling}
                for part in stream_generate(self._model, self._processor, prompt, **given):
                    stamps[number].append(time.perf_counter() - begin)
                    tokens[number].append(part.token)
            return {"seconds": time.perf_counter() - begin, "stamps": stamps, "tokens": tokens}

        def on_progress(done: int, total: int) -> None:
            if done == total:
                prompted.append(time.perf_counter() - begin)

        tokens = []
        for first in range(0, len(work), rows):  # it has no notion of rows that join: as many as go at once, then more
            part = work[first : first + rows]
            made = generate_batch(
                self._model,
                self._processor,
                [prompt for prompt, _ in part],
                max_tokens=max(new for _, new in part),
                sampling=self._sampling,
                on_progress=on_progress,
            )
            tokens += [answer.tokens[:new] for answer, (_, new) in zip(made, part, strict=True)]
        seconds = time.perf_counter() - begin
        return {"seconds": seconds, "stamps": None, "prompted": prompted[0], "tokens": tokens}


class _Engine(_Ours):
    def answers(self, work: Work, rows: int, hurry: bool) -> dict[str, Any]:
        from mlx_qwen35 import Engine

        stamps, tokens = [[] for _ in work], [[] for _ in work]
        options = {"pause": _HURRY} if hurry else {}
        with Engine(self._model, self._processor, most_rows=rows, **options) as engine:
            begin = time.perf_counter()

            def read(number: int) -> None:
                for part in asked[number]:
                    stamps[number].append(time.perf_counter() - begin)
                    tokens[number].append(part.token)

            asked = [engine.submit(prompt, max_tokens=new, sampling=self._sampling) for prompt, new in work]
            _each(read, len(work))
            seconds = time.perf_counter() - begin
        return {"seconds": seconds, "stamps": stamps, "tokens": tokens}

    def stall(self, running: Work, late: list[int], quiet: int) -> dict[str, Any]:
        from mlx_qwen35 import Engine

        stamps = [[] for _ in running]
        enough = threading.Semaphore(0)  # one more for each row that had its quiet gaps
        with Engine(self._model, self._processor, most_rows=len(running) + 1) as engine:
            asked = [engine.submit(prompt, max_tokens=new, sampling=self._sampling) for prompt, new in running]

            def read(number: int) -> None:
                if number == len(running):
                    for _ in running:
                        enough.acquire()
                    begin = time.perf_counter()
                    answer = engine.submit(late, max_tokens=2, sampling=self._sampling)
                    next(iter(answer))
                    moments.extend([begin, time.perf_counter()])
                    for each in [answer, *asked]:
                        each.cancel()
                    return
                for _ in asked[number]:
                    stamps[number].append(time.perf_counter())
                    if len(stamps[number]) == quiet + 1:
                        enough.release()

            moments: list[float] = []
            _each(read, len(running) + 1)
        return _gaps(stamps, *moments, quiet)


def _each(read: Callable[[int], None], count: int) -> None:
    """read(number) for each, on a thread of its own; raises what one of them raised."""
    raised: list[BaseException] = []

    def one(number: int) -> None:
        try:
            read(number)
        except BaseException as error:  # noqa: BLE001
            raised.append(error)

    threads = [threading.Thread(target=one, args=(number,), daemon=True) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive() and not raised:
            thread.join(0.2)
    if raised:
        raise raised[0]


_KINDS = {"ours": _Ours, "engine": _Engine, "before": _Before, "mlx-lm": _MlxLm, "mlx-vlm": _MlxVlm}
NAMES = tuple(_KINDS)


def main() -> None:
    side = _KINDS[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        job = getattr(side, asked.pop("job"))
        print(json.dumps(job(**asked)), flush=True)


if __name__ == "__main__":
    main()
