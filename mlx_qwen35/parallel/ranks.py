"""The other ranks as rank 0 has them: what they are told, whether they live, and what is done when one does not.

Knows wires, processes and time. Knows no layers.

Whoever is lost, all others are told who and why, and end. Rank 0's own call then ends with MLX's error where it
notices; where it waits for ever (a rank that was stopped), this process ends some seconds later, with STATUS. A rank
that lives and does nothing more, this one included, is found by what all say of their progress.
"""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.errors import RankLostError, SessionError
from mlx_qwen35.parallel.call import Call
from mlx_qwen35.parallel.early import end_at_once
from mlx_qwen35.parallel.progress import READS, Progress, Sign, hanging
from mlx_qwen35.parallel.wire import BYTES, EVERY, FAILED, FRAME, TOLD, Watched, Wire

WATCHED = "MLX_QWEN35_WATCHED"  # another process starts this one again (cli/watching.py)
_TELLING = 1.5  # seconds for clients to be told before that
_GRACE = 4.0  # seconds for a call to end by itself once a rank is lost
_NAMING = 3.0  # seconds that an error of MLX waits for the name of who is lost
_ENDING = 5.0  # seconds for processes to end when they are told to


class Ranks:
    """`count` of them, this one included, of which none has come yet. names: in words, such as "rank 1 (studio, process
    77)". children: those that this process has started. progress: of this rank."""

    def __init__(self, count: int) -> None:
        self.names = [f"rank {rank}" for rank in range(count)]
        self.children: dict[int, subprocess.Popen[bytes]] = {}
        self.lost: str | None = None
        self.progress = Progress()
        self._lock, self._named, self._naming = threading.RLock(), threading.Event(), threading.Lock()
        self._busy = self._closed = False
        self._here: dict[int, Watched] = {}

    @property
    def _watched(self) -> list[Watched]:
        return [self._here[rank] for rank in sorted(self._here)]

    def admit(self, rank: int, wire: Wire) -> None:
        """One has come; from now on it is watched. Raises ValueError where it is none of these, or is here already."""
        if not 0 < rank < len(self.names) or rank in self._here:
            raise ValueError(f"rank {rank} of {len(self.names)}")
        self._here[rank] = Watched(
            wire,
            lambda why: self._lose(f"{self.names[rank]} is lost: {self._reason(rank, why)}", rank),
            lambda text: self._lose(f"{self.names[rank]} failed: {text}", rank),
        )
        if self.lost is not None:
            self._here[rank].send(FAILED, self.lost.encode())
        if len(self._here) == 1:
            threading.Thread(target=self._judge, name="mlx-qwen35 judge", daemon=True).start()

    def wait_for_all(self, seconds: float) -> None:
        """Until all have come. Raises RankLostError, with who has not."""
        until = time.monotonic() + seconds
        while len(self._here) < len(self.names) - 1:
            self.check()
            absent = [rank for rank in range(1, len(self.names)) if rank not in self._here]
            ended = [rank for rank in absent if rank in self.children and self.children[rank].poll() is not None]
            if ended or time.monotonic() > until:
                why = "ended before it came" if ended else f"did not come within {seconds:.0f} seconds"
                self.fail(f"rank {', '.join(map(str, ended or absent))} {why}; there are to be {len(self.names)} ranks")
            time.sleep(0.05)

    @contextmanager
    def calling(self) -> Iterator[None]:
        """Inside, one thread speaks to the others. Raises RankLostError where one is gone."""
        with self._lock:
            self.check()
            yield

    def send_call(self, call: Call) -> None:
        """All of it is on its way on return."""
        frame = call.frame().tobytes()
        parts = [] if call.embedded is None else [*map(_bytes, call.embedded)]
        for each in self._watched:
            each.send(FRAME, frame)
            for part in parts:
                each.send(BYTES, part)
        self.check()

    @contextmanager
    def together(self, allowed: float = READS) -> Iterator[None]:
        """Inside, all ranks compute; whatever goes wrong breaks the group. Raises RankLostError, which names who.

        allowed: seconds without progress, after which one hangs.
        """
        self._busy = True
        try:
            with self.progress.working(allowed):
                yield
        except KeyboardInterrupt as error:
            self.failed_here(error)
            raise
        except BaseException as error:
            if not self._named.wait(_NAMING):
                self.failed_here(error)
            raise RankLostError(self.lost) from error
        finally:
            self._busy = False
        self.check()

    def tell(self, **what: Any) -> None:
        for each in self._watched:
            each.tell(**what)

    def answers(self, seconds: float | None = None) -> list[dict[str, Any]]:
        """What each says to what it was told. Raises RankLostError, also after so many seconds."""
        found, until = [], None if seconds is None else time.monotonic() + seconds
        for rank, each in sorted(self._here.items()):
            while True:
                message = each.next(0.2)
                if message is not None and message[0] == TOLD:
                    found.append(json.loads(bytes(message[1])))
                    break
                self.check()
                if message is not None or (until is not None and time.monotonic() > until):
                    self._lose(f"{self.names[rank]} does not answer", rank)
        return found

    def ask(self, **what: Any) -> list[dict[str, Any]]:
        """Tell, and have the answers; raises SessionError with what one of them says against it."""
        with self.calling():
            self.tell(**what)
            found = self.answers()
        for rank, answer in enumerate(found, start=1):
            if problem := answer.get("problem"):
                raise SessionError(f"{self.names[rank]}: {problem}")
        return found

    def fail(self, why: str) -> None:
        """The group is broken by what happened here."""
        self._lose(why, None)

    def failed_here(self, error: BaseException) -> None:
        """Likewise, by an error or an interrupt."""
        interrupted = isinstance(error, KeyboardInterrupt)
        self.fail(f"{self.names[0]} was interrupted" if interrupted else f"{self.names[0]} failed: {error}")

    def close(self) -> None:
        """In good order: the others end. Those that do not are ended."""
        if self._closed:
            return
        self._closed = True
        for each in self._watched:
            each.close()
        self.end_children()

    def end_children(self) -> None:
        """What was started here has ended on return; those that do not by themselves are ended."""
        until = time.monotonic() + _ENDING
        for child in self.children.values():
            try:
                child.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()

    def check(self) -> None:
        """Raises RankLostError where one is gone, or all were told to end."""
        if self.lost is not None:
            raise RankLostError(self.lost)
        if self._closed:
            raise RankLostError("the ranks were told to end: load the model again")

    def _reason(self, rank: int, why: str) -> str:
        child = self.children.get(rank)
        with suppress(subprocess.TimeoutExpired):
            if child is not None and (status := child.wait(0.3)):
                return f"its process ended with status {status}"
        return why

    def _judge(self) -> None:
        """Apart from what listens and what works."""
        seen: dict[int, tuple[Sign, float]] = {}
        while self.lost is None and not self._closed:
            now = time.monotonic()
            for rank, sign in self._signs().items():
                if rank not in seen or seen[rank][0] != sign:
                    seen[rank] = sign, now
            if found := hanging({rank: (sign, now - since) for rank, (sign, since) in seen.items()}):
                if 0 in found:
                    self._busy = True  # at whatever it is
                self._lose(self._of_hanging(found, now - min(seen[rank][1] for rank in found)), None)
            time.sleep(EVERY)

    def _signs(self) -> dict[int, Sign]:
        """What each rank said last; of those that have come and said something."""
        found = {0: self.progress.sign()}
        for rank, each in dict(self._here).items():
            if body := each.wire.sign:
                try:
                    found[rank] = Sign.read(body)
                except ValueError as error:
                    self._lose(f"{self.names[rank]} failed: {error}", rank)
        return found

    def _of_hanging(self, found: Sequence[int], seconds: float) -> str:
        names = " or ".join(self.names[rank] for rank in found)
        return f"{names} hangs: it lives, and has done nothing for {seconds:.0f} seconds"

    def _lose(self, text: str, rank: int | None) -> None:
        with self._naming:
            if self.lost is not None or self._closed:
                return
            self.lost = text
        self._named.set()
        for number, each in sorted(self._here.items()):
            if number != rank:
                each.send(FAILED, text.encode())
        if rank in self.children:
            self.children[rank].kill()  # one that was stopped, too: MLX notices then
        threading.Thread(target=self._end_if_stuck, name="mlx-qwen35 ranks", daemon=True).start()

    def _end_if_stuck(self) -> None:
        watched = WATCHED in os.environ
        time.sleep(_TELLING if watched else _GRACE)
        if self._busy or watched:
            end_at_once(self.lost)


def _bytes(array: mx.array | None) -> bytes:
    """Dtype, shape and values; nothing for None."""
    if array is None:
        return b""
    values = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    name = str(array.dtype).removeprefix("mlx.core.")
    head = f"{name} {' '.join(map(str, array.shape))}\n".encode()
    return head + np.ascontiguousarray(np.array(values)).tobytes()


def read_bytes(body: bytes | bytearray) -> mx.array | None:
    """What `_bytes` made."""
    if not body:
        return None
    head, _, values = bytes(body).partition(b"\n")
    name, *shape = head.decode().split()
    kind = {"bfloat16": "uint16"}.get(name, name)
    array = mx.array(np.frombuffer(values, kind).reshape([int(size) for size in shape]))
    return array.view(mx.bfloat16) if name == "bfloat16" else array
