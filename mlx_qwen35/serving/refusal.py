"""What a client is told when it is not answered.

Knows kinds of refusal and their HTTP status. Each interface has words of its own for them.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlx_qwen35.errors import (
    BudgetError,
    BusyError,
    CheckpointError,
    EngineClosedError,
    GrammarError,
    LengthError,
    Qwen35Error,
    RankLostError,
)

# kind -> HTTP status
STATUS = {
    "invalid": 400,
    "too_long": 400,  # the prompt is longer than the context
    "unauthorized": 401,
    "forbidden": 403,
    "not_found": 404,
    "not_allowed": 405,
    "too_large": 413,
    "busy": 429,
    "broken": 500,
    "unavailable": 503,  # shutting down, or a model that cannot be loaded now
}


@dataclass
class Refusal(Exception):
    """kind: one of STATUS. message: one sentence for people, which says what to do. param: the field at fault.

    tokens, most: of a prompt that is too long. retry_after: seconds.
    """

    kind: str
    message: str
    param: str | None = None
    tokens: int | None = None
    most: int | None = None
    retry_after: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def status(self) -> int:
        return STATUS[self.kind]

    @classmethod
    def of(cls, error: BaseException) -> Refusal:
        """What a client is told of an error; of one that is not ours it is told nothing but that it happened."""
        if isinstance(error, Refusal):
            return error
        if isinstance(error, BusyError):
            return cls("busy", str(error), retry_after=5)
        if isinstance(error, EngineClosedError):
            return cls(
                "unavailable", "the server is closing, or was told to unload this model: ask again", retry_after=1
            )
        if isinstance(error, CheckpointError):
            return cls("unavailable", str(error))
        if isinstance(error, RankLostError):
            return cls("unavailable", str(error), retry_after=10)
        if isinstance(error, LengthError):
            return cls("too_long", str(error), tokens=error.tokens, most=error.most)
        if isinstance(error, BudgetError):
            return cls("too_large", str(error))
        if isinstance(error, (GrammarError, ValueError, OverflowError)):
            return cls("invalid", str(error))
        if isinstance(error, Qwen35Error):
            return cls("broken", str(error))
        return cls("broken", f"the server failed ({type(error).__name__}); its log has the place")
