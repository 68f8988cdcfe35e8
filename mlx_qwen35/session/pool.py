"""Several sessions of one model in a given amount of memory.

Knows which was used last and what each holds. Knows nothing of tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from mlx_qwen35.session.saving import Session

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor


class Sessions:
    """Sessions that share one model and `most_bytes`: the one that was used longest ago gives its memory back first.

    It stays usable then: its next prompt is computed from the beginning. What branches share counts once, and is kept
    as long as one of them has it. The session that was used last is kept, however large it is, and so is one that is
    answering.
    """

    def __init__(
        self,
        model: Model,
        processor: Processor | None = None,
        *,
        most_bytes: int,
        snapshot_bytes: int | None = None,
    ) -> None:
        """processor, snapshot_bytes: of each session."""
        if most_bytes < 0:
            raise ValueError(f"most_bytes is {most_bytes}; give 0 (keep only the session in use) or more")
        self.most_bytes = most_bytes
        self._model, self._processor, self._snapshot_bytes = model, processor, snapshot_bytes
        self._sessions: dict[int, weakref.ref[Session]] = {}  # the one used last is the last

    def new(self) -> Session:
        """An empty session. It is one of these as long as somebody holds it."""
        session = Session(self._model, self._processor, snapshot_bytes=self._snapshot_bytes, pool=self)
        self.used(session)
        return session

    def __iter__(self) -> Iterator[Session]:
        """The one used longest ago first."""
        return iter([session for ref in self._sessions.values() if (session := ref()) is not None])

    def __len__(self) -> int:
        return len(list(iter(self)))

    @property
    def nbytes(self) -> int:
        """Bytes held by all together."""
        held: dict[int, int] = {}
        for session in self:
            held |= {key: array.nbytes for key, array in session.buffers().items()}
        return sum(held.values())

    def used(self, session: Session) -> None:
        """It is the one used last now; others make room if there is too little."""
        alive = {id(other): weakref.ref(other) for other in self if other is not session}
        self._sessions = {**alive, id(session): weakref.ref(session)}
        for other in self:
            if other is session or self.nbytes <= self.most_bytes:
                return
            if not other.in_use:
                other.forget()
