"""Whose turn it is: who gets a cache, whose prompt is computed next and how much of it, who decodes, who waits.

Knows counts, bytes and times that it is told. Knows no model, no arrays, no threads and no clock.

**Order.** The higher priority first, then who came first. A step of priority is worth 30 seconds of waiting: one of
priority p is overtaken by none of priority p + d that came more than 30 d seconds later, so none waits for ever.

**Rows.** At most `most_rows` have a cache. Who comes first and does not fit into the bytes that are free waits, and
smaller ones behind it may go first, 8 of them; then nobody does until it fits. It always fits where nobody runs.

**Bytes.** A row reserves its prompt, 256 tokens of answer (or as many as it may have) and `bytes_per_row`; before
these are used up, 256 more. If the bytes run out, the store of prefixes gives up what nobody uses (`Turn.free`); then
the last of the order that runs is put back, to compute its prompt and its answer so far again when there is room for
it and for the next 256 tokens of each row before it. The first of the order is never put back, so that it ends, and
the next becomes the first: every request ends.

**Prompts.** In pieces between the steps of those that decode (pieces.py has how long and how often); whole chunks where
nobody does. The first of the order is computed first. One of its priority, or a higher one, that has less left to
compute may go before it as long as what it has let go before it is less than it has left itself: in all, the first
waits for no more tokens than its own. A row that waits for a prefix that another computes lends it its place.

**One call.** Where a piece leaves room in its call (`together_chunk`, and beside those who decode what a pause allows),
pieces of the next in order fill it. Where nobody decodes only short ones do: the first waits for all of them.

**Rows first.** Where nobody reads along (`rows_first`) steps wait until no row has a prompt to compute: a step of many
rows takes little longer than one of few.

**Steps.** All rows that decode together take one step a turn. Rows that decode alone take turns with them: the others'
step, then one of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

from mlx_qwen35.engine.pieces import Pieces
from mlx_qwen35.errors import ArgumentError, BudgetError, BusyError

STRETCH = 256  # tokens that a row reserves at a time
_MARGIN = 16  # tokens before the end of what is reserved at which more is: a round of drafts makes several
_STEP = 30.0  # seconds of waiting that a step of priority is worth
_OVERTAKEN = 8  # smaller requests that may go before one that does not fit


@dataclass(frozen=True)
class Load:
    """What one request weighs.

    prompt_tokens: of its prompt, all of it. most_tokens: of the prompt and the longest answer. priority: higher goes
    first. deadline: a time on the caller's clock. alone: it does not decode beside others in one call. apart: nor is
    its prompt computed so.
    """

    prompt_tokens: int
    most_tokens: int
    priority: int = 0
    deadline: float | None = None
    alone: bool = False
    apart: bool = False


@dataclass(frozen=True)
class Turn:
    """What to do now, in this order; every field may be empty.

    expired: those whose deadline is past, waiting or running: end them. They are told again until they have ended.
    put_back: those whose cache is given up; they wait again, and have to compute their prompt and what they have of an
    answer once more. free: bytes that the store has to give up. admit: those that get a cache now (tell `covered` and
    `waits_for_prefix`; their prompts' turn comes from the next turn on). prefill: whose prompts get a piece, in
    one call, and of how many tokens each at the most. decode: whether those whose prompts are done take a step
    together. solo: who takes a step of its own; never together with `decode`. store_bytes: the most bytes the store may
    hold from now on, those in use too; None: as many as it likes.
    """

    admit: tuple[Hashable, ...] = ()
    prefill: tuple[tuple[Hashable, int], ...] = ()
    decode: bool = False
    expired: tuple[Hashable, ...] = ()
    put_back: tuple[Hashable, ...] = ()
    free: int = 0
    solo: Hashable | None = None
    store_bytes: int | None = None


class _Job:
    """One request, from submit to its end."""

    def __init__(self, key: Hashable, load: Load, now: float, number: int) -> None:
        self.key, self.load, self.number = key, load, number
        self.rank = (now - _STEP * load.priority, number)
        self.need = load.prompt_tokens  # to compute before it decodes
        self.computed = self.answer = 0
        self.reserved = 0  # tokens; 0: it waits
        self.behind: Hashable | None = None  # who computes what it begins with
        self.reading = False  # that is read from a disk
        self.passed = 0  # tokens of prompts that it let go before its own
        self.overtaken = 0
        self.seen = self.again = False  # a turn left it waiting; it was put back

    @property
    def done(self) -> bool:
        return self.computed >= self.need

    @property
    def left(self) -> int:
        return self.need - self.computed

    def next_reserve(self) -> int:
        """Tokens to reserve for what it has and a stretch more."""
        tokens = self.load.prompt_tokens + self.answer
        return max(1, tokens, min(tokens + STRETCH, self.load.most_tokens))

    def put_back(self) -> None:
        self.need = self.load.prompt_tokens + self.answer
        self.computed = self.reserved = self.passed = 0
        self.behind, self.reading, self.seen, self.again = None, False, True, True


class Scheduler:
    """most_rows: caches at once. most_waiting: requests that may wait for one; None: any number. cache_bytes: of all
    caches and of the store; None: any number. bytes_per_token, bytes_per_row: what a cache takes, by the token and
    once (delta states, and what its capacity is rounded up by). pause: seconds of pieces of prompts for each second of
    others' steps; 0: they wait until nobody decodes. chunk, least: tokens of the longest piece, and of the shortest.
    together_chunk: tokens of a call that computes pieces of several prompts, at the most; 0: there is none. rows_first:
    steps wait for prompts.
    """

    def __init__(
        self,
        *,
        most_rows: int = 8,
        most_waiting: int | None = None,
        cache_bytes: int | None = None,
        bytes_per_token: int = 0,
        bytes_per_row: int = 0,
        pause: float = 0.45,
        chunk: int = 2048,
        least: int = 16,
        together_chunk: int = 0,
        rows_first: bool = False,
    ) -> None:
        for name, value in (("most_rows", most_rows), ("chunk", chunk), ("least", least)):
            if value < 1:
                raise ArgumentError(f"{name} is {value}; it must be 1 or more")
        if not 0 <= pause < float("inf"):
            raise ArgumentError(f"pause is {pause}; it must be 0 or more: seconds of prompts for each second of steps")
        self.most_rows, self.most_waiting, self.cache_bytes = most_rows, most_waiting, cache_bytes
        self.bytes_per_token, self.bytes_per_row = bytes_per_token, bytes_per_row
        self.chunk, self.together_chunk, self.pause = chunk, together_chunk, pause
        self._pieces = Pieces(pause, chunk, least)
        self.rows_first, self._went_on = rows_first, True  # whether the last piece that was asked for was computed
        self._jobs: dict[Hashable, _Job] = {}  # in the order of their coming
        self._rows: dict[Hashable, _Job] = {}  # those with a cache, in the order in which they got it
        self._number = 0
        self._pinned, self._spare = 0, None
        self._beside = False  # whether somebody decoded in the last turn
        self._stepped: dict[Hashable, int] = {}  # turn in which each that decodes alone did so last
        self._together = self._turns = 0  # turn in which the others did; turns so far

    @property
    def waiting(self) -> tuple[Hashable, ...]:
        """Those without a cache, in the order in which they are looked at."""
        return tuple(job.key for job in self._waiting())

    @property
    def admitted(self) -> tuple[Hashable, ...]:
        """Those with a cache, in the order in which they got it."""
        return tuple(self._rows)

    @property
    def reserved_bytes(self) -> int:
        """Of all rows; what the store holds is not in it."""
        return self._bytes(list(self._rows.values()))

    def reserved_by(self, key: Hashable) -> int:
        """Bytes of one of them; 0: it has no cache."""
        return self._bytes([self._rows[key]]) if key in self._rows else 0

    def submit(self, key: Hashable, load: Load, now: float) -> None:
        """A new request, that waits. Raises BusyError where `most_waiting` wait, those not counted that find a row
        free, and BudgetError for one whose prompt alone takes more than `cache_bytes`."""
        if key in self._jobs:
            raise ValueError(f"{key!r} is here already: a request is submitted once")
        self.check(load)
        if self.most_waiting is not None:
            waiting = self._waiting()
            places = 0 if any(job.seen for job in waiting) else self.most_rows - len(self._rows)
            if len(waiting) - places >= self.most_waiting:
                raise BusyError(
                    f"{len(self._rows)} requests are running and {len(waiting)} are waiting; at most "
                    f"{self.most_waiting} may wait: try again when one has ended, or allow more to wait"
                )
        self._number += 1
        self._jobs[key] = _Job(key, load, now, self._number)

    def check(self, load: Load) -> None:
        """Raises BudgetError for a request that would never fit."""
        if self.cache_bytes is not None:
            bytes_ = self.bytes_per_row + self.bytes_per_token * load.prompt_tokens
            if bytes_ > self.cache_bytes:
                raise BudgetError(
                    f"the prompt has {load.prompt_tokens:,} tokens, whose cache takes {bytes_:,} bytes "
                    f"({self.bytes_per_token:,} a token and {self.bytes_per_row:,}); {self.cache_bytes:,} bytes are "
                    "there for all caches: shorten the prompt, or allow more memory"
                )

    def covered(self, key: Hashable, tokens: int) -> None:
        """The first `tokens` of its prompt need no computing any more. Of one that was put back, the prompt goes as far
        as its answer did: `prompt_tokens` and as many as `generated` told."""
        self._jobs[key].computed = tokens

    def waits_for_prefix(self, key: Hashable, on: Hashable | None) -> None:
        """`on` computes what this one begins with: its prompt waits until that is None, or `on` has no prompt to
        compute any more."""
        self._jobs[key].behind = on

    def waits_for_disk(self, key: Hashable, waits: bool) -> None:
        """What it begins with is being read: nothing of its prompt is computed meanwhile."""
        self._jobs[key].reading = waits

    def generated(self, key: Hashable, tokens: int) -> None:
        """So many tokens of its answer there are so far."""
        self._jobs[key].answer = tokens

    def held(self, other_bytes: int, spare: int | None = None) -> None:
        """Bytes beside those reserved that cannot be given up, and those that can. Where `spare` is not told,
        `Turn.free` is as if the store had filled all that the rows left."""
        self._pinned, self._spare = other_bytes, spare

    def measured_prefill(self, tokens: int, seconds: float) -> None:
        """The last turn's piece took so long."""
        self._pieces.computed(tokens, seconds, beside=self._beside)
        self._went_on = True

    def measured_decode(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        if rows:
            self._pieces.stepped(seconds)

    def ended(self, key: Hashable) -> None:
        """It has left, however it ended; one that is not here is none of our business."""
        self._jobs.pop(key, None)
        self._rows.pop(key, None)
        self._stepped.pop(key, None)

    def turn(self, now: float) -> Turn:
        """What to do now."""
        self._turns += 1
        late = {key for key, job in self._jobs.items() if job.load.deadline is not None and now >= job.load.deadline}
        rows = [job for key, job in self._rows.items() if key not in late]
        before = self._bytes(list(self._rows.values()))
        put_back = self._grow(rows)
        admit = [] if put_back else self._admit([job for job in self._waiting() if job.key not in late], rows)
        for job in self._jobs.values():
            job.seen = job.seen or not job.reserved
        reserved = self._bytes(rows)

        running = [job for job in rows if job not in admit]
        decoding = [job for job in running if job.done]
        self._beside = bool(decoding) and not self.rows_first
        prompts = [job for job in running if not job.done and not job.reading]
        self._pieces.crowd(len(prompts), len(decoding))
        prefill = self._prefill(prompts)
        waits = self.rows_first and bool(prefill) and self._went_on
        self._went_on = not waits
        solo, decode = (None, False) if waits else self._step(decoding)
        return Turn(
            admit=tuple(job.key for job in admit),
            prefill=prefill,
            decode=decode,
            expired=tuple(key for key in self._jobs if key in late),
            put_back=tuple(job.key for job in put_back),
            free=self._free(reserved, before),
            solo=solo,
            store_bytes=None if self.cache_bytes is None else max(0, self.cache_bytes - reserved),
        )

    def _waiting(self) -> list[_Job]:
        return sorted((job for job in self._jobs.values() if not job.reserved), key=lambda job: job.rank)

    def _bytes(self, rows: list[_Job]) -> int:
        return sum(self.bytes_per_row + self.bytes_per_token * job.reserved for job in rows)

    def _free(self, reserved: int, before: int) -> int:
        if self.cache_bytes is None:
            return 0
        if self._spare is None:
            return max(0, reserved - before)
        return min(self._spare, max(0, reserved + self._pinned + self._spare - self.cache_bytes))

    def _room(self, rows: list[_Job]) -> float:
        """Bytes that are left, if the store gives up all that it can; negative: too many are reserved."""
        return float("inf") if self.cache_bytes is None else self.cache_bytes - self._pinned - self._bytes(rows)

    def _grow(self, rows: list[_Job]) -> list[_Job]:
        """Reserve more where a row has come near the end of what it has; those whose cache is given up for it."""
        for job in rows:
            if job.load.prompt_tokens + job.answer + _MARGIN > job.reserved:
                job.reserved = max(job.reserved, job.next_reserve())
        out = []
        while len(rows) > 1 and self._room(rows) < 0:
            last = max(rows, key=lambda job: job.rank)
            rows.remove(last)
            del self._rows[last.key]
            self._stepped.pop(last.key, None)
            last.put_back()
            out.append(last)
        return out

    def _admit(self, waiting: list[_Job], rows: list[_Job]) -> list[_Job]:
        """Those of `waiting` (in their order) that get a cache now; they are put into `rows`."""
        admitted, passed = [], []
        for job in waiting:
            if len(rows) >= self.most_rows or any(other.overtaken >= _OVERTAKEN for other in passed):
                break
            if rows and not self._fits(job, rows):
                passed.append(job)
                continue
            job.reserved, job.overtaken = job.next_reserve(), 0
            for other in passed:
                other.overtaken += 1
            self._rows[job.key] = job
            rows.append(job)
            admitted.append(job)
        return admitted

    def _fits(self, job: _Job, rows: list[_Job]) -> bool:
        tokens = job.next_reserve()
        if job.again:  # or it would soon be put back again
            before = [other for other in rows if other.rank < job.rank]
            tokens += sum(min(STRETCH, max(0, other.load.most_tokens - other.reserved)) for other in before)
        return self.bytes_per_row + self.bytes_per_token * tokens <= self._room(rows)

    def _prefill(self, prompts: list[_Job]) -> tuple[tuple[Hashable, int], ...]:
        """Whose prompts get a piece, and of how many tokens each."""
        if not self._beside:
            self._pieces.nobody_decodes()
        if not prompts:
            return ()
        most = self._pieces.next() if self._beside else self.chunk
        if not most:
            return ()
        by_key = {job.key: job for job in prompts}
        ready = [job for job in prompts if job.behind not in by_key] or prompts  # a ring of them waits for itself
        places = {job.key: job for job in ready}  # who is served by its going on: itself, or one behind it
        for job in prompts:
            at, steps = job, 0
            while at.key not in places and steps < len(prompts):
                at, steps = by_key[at.behind], steps + 1
            if at.key in places and job.rank < places[at.key].rank:
                places[at.key] = job
        ready.sort(key=lambda job: places[job.key].rank)
        first = ready[0]
        priority = places[first.key].load.priority
        shorter = [
            job
            for job in ready[1:]
            if places[job.key].load.priority >= priority
            and first.passed + min(job.left, most) <= first.left
            and job.left < first.left
        ]
        chosen = min(shorter, key=lambda job: (job.left, job.rank), default=first)
        tokens = min(chosen.left, most)
        if chosen is not first:
            first.passed += tokens
        return ((chosen.key, tokens), *self._beside_it(chosen, ready, min(most, self.together_chunk) - tokens))

    def _beside_it(self, chosen: _Job, ready: list[_Job], room: int) -> Iterator[tuple[Hashable, int]]:
        """Whose prompts get a piece in the same call, in which there is room for so many tokens."""
        for job in ready:
            if job is chosen or job.load.apart or chosen.load.apart:
                continue
            tokens = min(job.left, room)
            if tokens < min(job.left, self._pieces.least):
                return
            if not (self._beside or self.rows_first or self._pieces.worth_sharing(tokens)):
                continue  # who is first would wait for longer than that saves
            room -= tokens
            yield job.key, tokens

    def _step(self, decoding: list[_Job]) -> tuple[Hashable | None, bool]:
        """Who takes a step of its own, or else whether the others take theirs."""
        together = any(not job.load.alone for job in decoding)
        alone = [job for job in decoding if job.load.alone]
        for job in alone:
            self._stepped.setdefault(job.key, self._turns - 1)  # one that is new has no claim to more than its share
        longest = min(alone, key=lambda job: (self._stepped[job.key], job.rank), default=None)
        if longest is None or (together and self._together <= self._stepped[longest.key]):
            self._together = self._turns
            return None, together
        self._stepped[longest.key] = self._turns
        return longest.key, False
