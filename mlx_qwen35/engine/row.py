"""One request while it is answered: its cache, how far its prompt is, what was computed and what was handed out.

Knows what a cache covers whenever the answer ends. Knows nothing of other rows or of whose turn it is.

Whenever it ends (end of turn, stop string, length, deadline, cancelled, closed, interrupted, an error), the cache
covers the prompt and exactly the tokens that were handed out: what was computed ahead is undone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from enum import Enum
from typing import TYPE_CHECKING

import mlx.core as mx

from mlx_qwen35.engine.group import Group, Seat
from mlx_qwen35.engine.prefill import Piece, Prefill
from mlx_qwen35.speculative.copying import LONG
from mlx_qwen35.speculative.rows import row_exact
from mlx_qwen35.text.parts import Clock, Part

if TYPE_CHECKING:
    from mlx_qwen35.cache import Cache, Snapshot
    from mlx_qwen35.engine.request import Request
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Prompt
    from mlx_qwen35.session import Session
    from mlx_qwen35.session.store import Store
    from mlx_qwen35.speculative.step import Step

_FIRST_LOOK = 16384  # tokens of a prompt that are taken in for copies while others wait: a tenth of a second


class Phase(Enum):
    """WAITING: has no cache; PROMPT: its prompt is being computed; ANSWER: its tokens are; ENDED."""

    WAITING = "waiting"
    PROMPT = "prompt"
    ANSWER = "answer"
    ENDED = "ended"


class Row:
    """A request, and where it is. `phase` says which methods make sense."""

    def __init__(self, key: Hashable, model: Model, request: Request) -> None:
        self.key, self.request = key, request
        self.phase = Phase.WAITING
        self.seat: Seat | None = None
        self.prefill: Prefill | None = None
        self.pending: deque[Step] = deque()  # computed, and not handed out
        self.made = 0  # tokens that were computed
        self.handed: list[int] = []
        self.error: BaseException | None = None
        self.session: Session | None = None
        self.group: Group | None = None  # in which it takes its steps
        self._model = model
        self._drawing = (*request.sampler(), None)  # and the token drawn last, while it has no seat
        self._stack = ExitStack()
        self._store: Store | None = None
        self._clock: Clock | None = None
        self._ending: Snapshot | None = None  # where the cache has to be if all ends now; None: where it is
        self._closing: list[Part] = []  # the last part, where it brings no token

    @property
    def prompt(self) -> Prompt:
        """What has to be computed before the next token: the prompt, and the answer before a cache was given up."""
        asked = self.request.prompt
        return replace(asked, tokens=[*asked.tokens, *self.handed]) if self.handed else asked

    @property
    def cache(self) -> Cache | None:
        return None if self.seat is None else self.seat.cache

    @property
    def left(self) -> int:
        """Tokens that it may still have."""
        return self.request.limit - self.made

    @property
    def due(self) -> bool:
        """Whether a step of it can be taken."""
        return self.phase is Phase.ANSWER and not self.pending and self.left > 0 and not self._closing

    @property
    def match(self) -> int | None:
        """Tokens at the end of what was said that were said before, too; None: it copies nothing, or to find out takes
        long."""
        text = None if self.seat is None else self.seat.text
        if text is None or self.left <= LONG or not text.is_known(_FIRST_LOOK):
            return None
        return text.match.length

    @property
    def ready(self) -> bool:
        """Whether `take` has something."""
        return bool(self.pending or self._closing or self.error)

    def begin(self, store: Store | None, *, wait: bool = True, behind: bool = False) -> bool:
        """Finds what of its prompt is computed already; False: another row is computing its beginning, or a file is
        read (`store.awaited`), ask again, or with wait=False, which begins in any case. behind: as in `Store.begin`."""
        request, prompt = self.request, self.prompt
        session, covered = request.session, request.covered
        if session is not None:
            if self.session is None:
                self._stack.enter_context(session.answering())
                self.session = session
            if store is not None:
                self._store = store
                if not store.seed(session, prompt, wait=wait, behind=behind):
                    return False
        elif request.cache is None and store is not None:
            session = store.begin(prompt, wait=wait, behind=behind)
            if session is None:
                return False
            self._stack.enter_context(session.answering())
            self.session, self._store = session, store
        if session is not None:
            covered = session.go_on(prompt)
            cache = session.cache
        else:
            cache = self._model.make_cache() if request.cache is None else request.cache
        self._sit(cache)
        if self._clock is None:
            self._clock = self._clock_at(cache.offset)
        self.prefill = Prefill(
            self._model,
            prompt.tokens,
            cache,
            media=prompt.media,
            features=request.features,
            covered=covered,
            chunk_size=request.chunk_size,
            stops=lambda: request.boundaries,
            places=lambda: [place - covered for place in self._meetings()],
            on_place=self._met,
            on_progress=self._progress,
            leaves=request.cancelled,
        )
        self.phase = Phase.PROMPT
        return True

    def _clock_at(self, offset: int) -> Clock:
        model = self._model  # not this row: a circle would hold its cache until Python looks for circles
        return Clock(offset, lambda: model.expert_stats, verified="exact" if row_exact(model) else "fast")

    def _sit(self, cache: Cache) -> None:
        request = self.request
        drafting = request.drafting
        cache.draft = drafter = None if drafting is None else drafting.drafter(self._model, cache)
        text = None if drafting is None else drafting.text(self._model, self.prompt.tokens)
        sampler, history, drawn = self._drawing
        self.seat = Seat(cache, sampler, history, drafter, request.matcher, request.top, drawn, text)

    def _meetings(self) -> list[int]:
        return [] if self.session is None else self.session.meetings

    def _met(self, snapshot: Snapshot) -> None:
        self.session.met(snapshot)

    def _progress(self, done: int, total: int) -> None:
        if self.session is not None:
            self.session.reached(self.prefill.chunk)
        if self.request.on_progress:
            self.request.on_progress(done, total)

    def next_piece(self, most: int | None, *, pausing: bool = False) -> Piece | None:
        """The next piece of its prompt, of `most` tokens at the most; None: it was cancelled, and ends without.
        pausing: the piece goes no further than to the next place where prompts meet."""
        if not self.prefill.begun:
            self.prefill.begin()
            if self.request.cancelled():
                self.end_without_piece()
                return None
        return self.prefill.next(most, pausing=pausing)

    def end_without_piece(self) -> None:
        """It was cancelled before a piece of its prompt, or in the middle of one."""
        self._clock.prompt_done(self.cache.offset)
        self.end("cancelled")

    def has_computed(self, piece: Piece, logits: mx.array | None) -> None:
        """The piece is in its cache; logits [1, V] with the last one, from which the first token is drawn."""
        try:
            piece.tell()
        finally:
            self._clock.prompt_done(self.cache.offset)
        if logits is None:
            return
        self.prefill, self.phase = None, Phase.ANSWER
        if self.request.limit == 0:
            self.end("length")
        elif self.seat.drawn is None:  # otherwise it was drawn before the cache was given up
            self.seat.draw_first(logits)

    def computed(self, steps: Sequence[Step]) -> None:
        """Tokens that came."""
        self.pending.extend(steps)
        self.made += len(steps)
        if self.seat.text is not None:
            for step in steps:
                self.seat.text.add(step.token)

    def take(self, *, distribution: bool = True) -> Part | None:
        """The next part, or None where there is none yet; raises what went wrong. distribution: with its logprobs."""
        if self.pending and self.pending[0].from_draft and self.request.cancelled():
            self.end("cancelled")  # in the middle of a round
        if self.pending:
            return self._part(self.pending.popleft(), distribution)
        if self._closing:
            return self._closing.pop()
        if self.error is not None:
            error, self.error = self.error, None
            try:
                raise error
            finally:
                del error  # which would hold this frame, and with it the row
        return None

    def _part(self, step: Step, distribution: bool) -> Part:
        self._ending = step.before
        self._clock.token(drafted=step.drafted, from_draft=step.from_draft, source=step.source)
        full = self._clock.generated == self.request.limit
        text, events, ended = self.request.answer.add(step.token, last=full)
        reason = "stop" if ended else "length" if full else None
        part = self._clock.part(
            text,
            events,
            step.token,
            step.logprobs if distribution else None,
            reason,
            from_draft=step.from_draft,
            told=step.told,
            index=self.request.index,
            stop_string=self.request.answer.stop_string,
        )
        self._ending = step.after
        self.handed.append(step.token)
        if reason:
            self.pending.clear()  # of a round of drafts there may be more
            self._leave()
        elif self.session is not None and self.cache.offset == len(self.request.prompt.tokens) + len(self.handed):
            # (a round of drafts may have brought the cache further than what was handed out)
            ahead = 1 if self.seat.drafter is None else self.request.drafting.most + 1
            if self.session.due(ahead):
                if self.group is not None:
                    self.group.settle(self.seat)
                self.session.reached(ahead)
        return part

    def end(self, reason: str) -> None:
        """It ends here for another reason than its own text. reason: the finish_reason of its last part. What goes
        wrong on the way `take` raises in its place: it ends in any case."""
        if self.phase is Phase.ENDED:
            return
        clock = self._clock or self._clock_at(0)
        self._drop_pending()
        try:
            self._leave()
        except Exception as error:
            self.error = error
            return
        text, events = self.request.answer.finish()
        self._closing = [clock.part(text, events, None, None, reason, index=self.request.index)]

    def fail(self, error: BaseException) -> None:
        """It ends with an error, which `take` raises after what was handed out."""
        if self.phase is not Phase.ENDED:
            self.error = error
            with suppress(Exception):  # what came first is told
                self.leave()

    def leave(self) -> None:
        """It ends without a last part: nobody reads on."""
        if self.phase is not Phase.ENDED:
            self._drop_pending()
            self._leave()

    def put_back(self) -> None:
        """Gives its cache up, to be computed again later; what was drawn and handed out stays."""
        self._rise()
        session, store, seat = self.session, self._store, self.seat
        mx.eval([] if seat.drawn is None else seat.drawn[0])
        if seat.text is not None:
            seat.text.close()
        self._drawing, self.seat = (seat.sampler, seat.history, seat.drawn), None
        session.settle([*self.request.prompt.tokens, *self.handed])
        if self.request.session is None:
            self._stack.close()
            self.session = None
        if store is not None:
            store.settled(session)
        if self.request.session is not None:  # it stays this row's: another may not answer with it meanwhile
            session.forget()
        self.prefill, self.phase = None, Phase.WAITING

    def _rise(self) -> None:
        """Out of the group, with all that is its own."""
        if self.group is not None:
            self.group.change(leaving=[self.seat])
            self.group = None

    def _drop_pending(self) -> None:
        if self.pending:
            if self._ending is None:
                self._ending = self.pending[0].before
            self.pending.clear()

    def _leave(self) -> None:
        """The cache covers what was handed out, and whoever owns it has it back."""
        self.phase = Phase.ENDED
        whole, begun = False, self.seat is not None  # one that waits has touched nothing of its session
        try:
            if begun:
                self._rise()
                if self._ending is not None:
                    self.cache.restore(self._ending)
                    mx.eval(self.cache.arrays())
                self.cache.detach()
                if self.session is not None:
                    self.session.settle([*self.request.prompt.tokens, *self.handed])
            whole = True
        finally:
            self._stack.close()
            if begun and self.seat.text is not None:
                self.seat.text.close()
            self.seat = self.prefill = None
            if self._store is not None and self.session is not None:
                self._store.settled(self.session) if whole else self._store.drop(self.session)
