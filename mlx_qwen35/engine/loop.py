"""The one loop: requests in, and each turn a step of those that answer and a piece of a prompt.

Knows rows and what the scheduler says of their turns. Has no thread: whoever drives it calls `turn`, on one thread.
Knows nothing of text, arguments or who reads the parts.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from itertools import count
from typing import TYPE_CHECKING

from mlx_qwen35.engine.among import Among
from mlx_qwen35.engine.drafted import Drafted
from mlx_qwen35.engine.group import Group
from mlx_qwen35.engine.prefill import Left, Piece, compute
from mlx_qwen35.engine.row import Phase, Row
from mlx_qwen35.engine.scheduler import Load, Scheduler, Turn
from mlx_qwen35.session.reading import Reading

if TYPE_CHECKING:
    from mlx_qwen35.engine.request import Request
    from mlx_qwen35.model import Model
    from mlx_qwen35.session import Session
    from mlx_qwen35.session.store import Store
    from mlx_qwen35.vision.features import FeatureStore

_GOING = (Phase.PROMPT, Phase.ANSWER)
_LOOK = 0.01  # seconds between two looks at what was asked for, while all wait for the disk
_PATIENCE = 16  # turns in which nothing is computed; the scheduler lets a few pass between pieces


class Loop:
    """Answers requests, several at once. store: of what was computed; None: nothing is kept between requests.
    features: of pictures, where they are kept within the bytes that the scheduler plans. behind: large files of the
    store are read while others compute.

    A turn hands nothing out: `Row.take` does, and a row of which something can be taken waits with its next step.
    """

    def __init__(
        self,
        model: Model,
        *,
        store: Store | None = None,
        features: FeatureStore | None = None,
        scheduler: Scheduler | None = None,
        behind: bool = False,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.computed_tokens = 0  # of prompts, so far
        self.held_bytes = 0  # of the store and the features of pictures, as it was last
        self.went_on = 0  # times that nobody's turn came, and somebody went on all the same
        self.scheduler = scheduler or Scheduler(most_rows=1, chunk=model.prefill_chunk)
        self.rows: dict[int, Row] = {}  # those that have not ended
        self._model, self._store, self._features, self._now = model, store, features, clock
        self._beyond = self._pinned = 0  # bytes that rows hold beyond what they reserved; that they hold in the store
        self._group = Group(model)
        self._drafted: dict[int, Drafted] = {}
        self._among = Among(self.scheduler.pause)
        self._keys = count()
        self._blocked: list[Row] = []  # another row computes their beginning
        self._behind, self._reading = behind, {}  # row: Reading of its beginning
        self._idle = 0  # turns in a row in which nothing was computed
        self._in_round = False  # whether this turn's step is a round of one row that copies, among others

    def add(self, request: Request) -> Row:
        """A request that waits for its turn. Raises BusyError or BudgetError where it is not taken."""
        row, now = Row(next(self._keys), self._model, request), self._now()
        prompt, deadline = len(request.prompt.tokens), request.deadline
        load = Load(
            prompt_tokens=prompt,
            most_tokens=prompt + request.limit,
            priority=request.priority,
            deadline=None if deadline is None else now + deadline,
            alone=request.steady,
            apart=bool(request.prompt.media) or request.cache is not None,
        )
        self.scheduler.submit(row.key, load, now)
        self.rows[row.key] = row
        return row

    def turn(self) -> None:
        """What is due now. An interrupt leaves every cache as it was before what it broke off; an error ends the rows
        that it concerns, whose `take` raises it."""
        self._look_at_disk()
        only = self._only()
        if only is not None:
            self._step_only(only)
            return
        turn = self.scheduler.turn(self._now())
        for key in turn.expired:
            self._end(self.rows.get(key), "deadline")
        for row in self._living():
            if row.request.cancelled():
                self._end(row, "cancelled")
        if any(row.phase is Phase.ENDED for row in self.rows.values()):
            self._sweep()  # nothing below concerns them any more
        if self._store is not None:
            self._make_room(turn)
        for key in turn.put_back:
            if key in self.rows:
                self._put_back(self.rows[key])
        for key in turn.admit:
            if key in self.rows:
                self._begin(self.rows[key])
        start, computed, self._in_round = self._now(), self.computed_tokens, False
        stepped = self._step_solo(turn.solo) if turn.solo in self.rows else turn.decode and self._step_together()
        if stepped and not self._in_round:
            self.scheduler.measured_decode(stepped, self._now() - start)
        if turn.prefill:
            self._read(turn.prefill, beside=stepped)
        self._idle = 0 if stepped or self.computed_tokens > computed else self._idle + 1
        if self._idle and self._reading and not any(row.phase in _GOING for row in self._living()):
            self._idle = 0
            next(iter(self._reading.values())).wait(_LOOK)  # there is nothing to compute
        elif self._idle >= _PATIENCE:
            self._go_on()
        self._sweep()

    def _look_at_disk(self) -> None:
        for row, reading in list(self._reading.items()):
            if reading.done and row.phase is Phase.WAITING:
                self._begin(row)

    def _go_on(self) -> None:
        """Whoever can go on does, whatever the scheduler says, and waits for nobody: so that no two can wait for each
        other."""
        self._idle, self.went_on = 0, self.went_on + 1
        for row in self._living():
            if row.phase is Phase.PROMPT:
                self._read([(row.key, row.prefill.chunk)], beside=False)
                return
        for row in [*self._blocked, *self._reading]:
            if row.phase is Phase.WAITING:
                self._begin(row, wait=False)
                return
        self._step_together()

    def _only(self) -> Row | None:
        """The one row that there is, where nothing about its steps is to be decided: a tenth of what a turn costs."""
        if len(self.rows) != 1 or self.scheduler.cache_bytes is not None:
            return None
        (row,) = self.rows.values()
        return row if row.phase is Phase.ANSWER and row.request.deadline is None else None

    def _step_only(self, row: Row) -> None:
        if row.request.cancelled():
            self._end(row, "cancelled")
        elif row.request.steady:
            self._step_solo(row.key)
        else:
            self._step_together()
        if row.phase is Phase.ENDED:
            self._sweep()

    def leave(self, row: Row) -> None:
        """Nobody reads its answer on: it ends where it was handed out."""
        row.leave()
        self._sweep()

    def close(self) -> None:
        """All rows leave."""
        for row in self._living():
            row.leave()
        self._sweep()

    def _living(self) -> Iterator[Row]:
        return iter([row for row in self.rows.values() if row.phase is not Phase.ENDED])

    def _sweep(self) -> None:
        for key in [key for key, row in self.rows.items() if row.phase is Phase.ENDED]:
            del self.rows[key]
            self._drafted.pop(key, None)
            self.scheduler.ended(key)
        self._blocked = [row for row in self._blocked if row.key in self.rows]
        if self._behind:
            self._reading = {row: reading for row, reading in self._reading.items() if row.key in self.rows}
            self._store.keep_readings(self._reading.values())
        if self._store is not None and self.scheduler.cache_bytes is not None:
            self._tell_of_store()

    def _make_room(self, turn: Turn) -> None:
        """The store, and then the pictures, give up what is asked for. What rows use is in the store's bytes, and
        reserved beside them: it counts once."""
        if turn.free:
            missing = turn.free - self._store.give_up(turn.free)
            if missing > 0 and self._features is not None:
                self._features.give_up(missing)
        if turn.store_bytes is not None:
            self._store.most_bytes = self._pinned + max(0, turn.store_bytes - self._beyond - self._kept_features)

    @property
    def _kept_features(self) -> int:
        return 0 if self._features is None else self._features.nbytes

    def _tell_of_store(self) -> None:
        """What is held beside the bytes that rows have reserved."""
        scheduler, beyond = self.scheduler, 0
        pinned, each = self._store.in_use()
        for row in self.rows.values():
            if row.cache is not None:
                beyond += max(0, each.get(id(row.session), 0) - scheduler.reserved_by(row.key))
        self.held_bytes = self._store.nbytes + self._kept_features
        self._beyond, self._pinned = beyond, pinned
        scheduler.held(beyond, self.held_bytes - pinned)

    def _end(self, row: Row | None, reason: str) -> None:
        if row is not None and not row.ready:  # what can be handed out is, first
            row.end(reason)

    def _begin(self, row: Row, *, wait: bool = True) -> None:
        try:
            begun = row.begin(self._store, wait=wait, behind=self._behind)
        except Exception as error:
            row.fail(error)
            return
        self._wait_no_more(row)
        self.scheduler.waits_for_prefix(row.key, None)
        self.scheduler.waits_for_disk(row.key, False)
        if begun:
            self.scheduler.covered(row.key, row.prefill.covered)
        elif isinstance(awaited := self._store.awaited, Reading):
            self.scheduler.waits_for_disk(row.key, True)
            self._reading[row] = awaited
        elif (leader := self._leader(awaited)) is not None:
            self.scheduler.waits_for_prefix(row.key, leader.key)
            self._blocked.append(row)
        else:  # it would wait for ever: of this loop nobody computes that
            self._begin(row, wait=False)

    def _wait_no_more(self, row: Row) -> None:
        self._blocked = [other for other in self._blocked if other is not row]
        self._reading.pop(row, None)

    def _leader(self, awaited: Session | None) -> Row | None:
        """The row that computes on a session for which another is to wait. It has begun, and so waits for nobody: a
        chain of those who wait is never longer than one, and no ring."""
        prompts = (row for row in self.rows.values() if row.phase is Phase.PROMPT)
        return next((row for row in prompts if row.session is awaited), None)

    def _put_back(self, row: Row) -> None:
        if row.cache is not None:  # one that waits for another's prompt has none yet
            self._sit_out(row)
            row.put_back()
        self._wait_no_more(row)

    def _sit_out(self, row: Row) -> None:
        """Out of what takes its steps, with everything back."""
        if row.key in self._drafted:
            self._drafted.pop(row.key).stop()
        if row.group is not None:
            row.group.change(leaving=[row.seat])
            row.group = None

    def _read(self, turns: Sequence[tuple[Hashable, int]], *, beside: bool | int) -> None:
        """Pieces of the prompts of these rows, of so many tokens at the most, in one call."""
        given, start = [], self._now()
        for key, most in turns:
            row = self.rows.get(key)
            if row is not None and row.phase is Phase.WAITING:
                self._begin(row)
            if row is not None and row.phase is Phase.PROMPT:
                given.append((row, most))
        pieces = self._computed_of(given, queued=bool(beside))
        if not pieces:
            return
        tokens, seconds = sum(piece.length for piece in pieces.values()), self._now() - start
        self.computed_tokens += tokens
        self.scheduler.measured_prefill(tokens, seconds)
        for row, piece in pieces.items():
            if row.key in self.rows:
                self.scheduler.covered(row.key, piece.prefill.covered + piece.prefill.done)
        blocked, self._blocked = self._blocked, []
        for other in blocked:
            self._begin(other)

    def _computed_of(self, given: Sequence[tuple[Row, int]], *, queued: bool) -> dict[Row, Piece]:
        """Computes the next piece of each row; -> those that were. queued: as in `compute`."""
        pieces: dict[Row, Piece] = {}
        for row, most in given:
            try:
                piece = row.next_piece(most, pausing=bool(self._blocked))
            except Exception as error:
                row.fail(error)
            else:
                pieces |= {} if piece is None else {row: piece}
        if not pieces:
            return {}
        try:
            logits = compute([*pieces.values()], queued=queued)
        except Left:
            for row in pieces:
                row.end_without_piece()
            return {}
        except Exception as error:
            if len(pieces) == 1:
                (row,) = pieces
                row.fail(error)
                return {}
            # whosever it was, the others are computed
            found = (self._computed_of([(row, piece.length)], queued=queued) for row, piece in pieces.items())
            return {row: piece for each in found for row, piece in each.items()}
        for (row, piece), last in zip(pieces.items(), logits, strict=True):
            try:
                row.has_computed(piece, last)
            except Exception as error:
                row.fail(error)
        return pieces

    def _step_together(self) -> int:
        """A step of all that answer and do not draft for themselves; -> of how many."""
        answering = [row for row in self._living() if row.phase is Phase.ANSWER and not row.request.steady]
        due = [row for row in answering if row.due]
        if len(answering) == 1 and due and due[0].seat.drafts:
            return self._step_solo(due[0].key)
        copying = self._among.next({row.key: row.match for row in answering}) if len(due) == len(answering) else None
        if copying is not None:
            return self._round_among(copying)
        for row in due:
            if row.key in self._drafted:
                self._sit_out(row)
        staying = {id(row.seat) for row in due}
        joining = [row for row in due if row.group is None]
        for row in answering:
            if row.group is not None and id(row.seat) not in staying:
                self._sit_out(row)
        if not due:
            return 0
        self._group.change(joining=[row.seat for row in joining])
        for row in joining:
            row.group = self._group
        by_seat = {id(row.seat): row for row in due}
        rows = [by_seat[id(seat)] for seat in self._group.seats]
        start = self._now()
        try:
            steps = self._group.step(drawing=any(row.left > 1 for row in rows))
        except Exception as error:
            for row in rows:
                row.fail(error)
            return 0
        if len(rows) > 1:
            self._among.stepped(self._now() - start)
        for row, step in zip(rows, steps, strict=True):
            self._made(row, [step])
        return len(rows)

    def _round_among(self, key: int) -> int:
        """A round of a row that copies, while others wait for it; -> of how many rows that was."""
        row, start, self._in_round = self.rows[key], self._now(), True
        made = row.made
        stepped = self._step_solo(key)
        self._among.copied(key, row.made - made, self._now() - start)
        return stepped

    def _step_solo(self, key: int) -> int:
        """A step, or a round of drafts, of one row by itself; -> of how many rows that was."""
        row = self.rows[key]
        if not row.due:
            return 0
        if row.group is not None:
            self._sit_out(row)
        if key not in self._drafted:
            self._drafted[key] = Drafted(self._model, row.seat)
        try:
            self._made(row, self._drafted[key].steps(row.left))
        except Exception as error:
            self._drafted.pop(key).stop()
            row.fail(error)
            return 0
        return 1

    def _made(self, row: Row, steps: list) -> None:
        row.computed(steps)
        self.scheduler.generated(row.key, row.made)
