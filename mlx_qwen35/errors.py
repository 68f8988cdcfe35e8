"""The errors of this package. Knows nothing of the parts that raise them.

Every message names the file or argument at fault and says what to do about it.
"""

from __future__ import annotations


class Qwen35Error(Exception):
    """Base of every error that this package raises on purpose."""


class Qwen35Warning(UserWarning):
    """What will work, and worse than it could: the message says how much and what to do."""


class CheckpointError(Qwen35Error, ValueError):
    """A file of a checkpoint (config, weights, tokenizer, template) is missing, damaged or not supported."""


class PromptError(Qwen35Error, ValueError):
    """What was asked cannot become a prompt: refused by the template, empty, longer than the context, ..."""


class LengthError(PromptError):
    """A prompt is longer than the context. tokens: that it has; most: that it may have."""

    def __init__(self, message: str, tokens: int, most: int) -> None:
        super().__init__(message)
        self.tokens, self.most = tokens, most


class ArgumentError(PromptError, TypeError):
    """An argument has a value or a type that means nothing, or a name that there is not."""


class SessionError(Qwen35Error, ValueError):
    """A saved session is damaged or that of another model, or a session is asked for something while it answers."""


class ExpertReadError(Qwen35Error):
    """An expert's bytes could not be had from the disk while a model was running: nothing was computed with them."""


class BusyError(Qwen35Error):
    """As many requests are waiting as may: try again when one has ended."""


class BudgetError(Qwen35Error):
    """A request cannot be answered within the memory that all of them may take."""


class GrammarError(Qwen35Error):
    """An answer cannot go on in the form that was asked for: a token was taken that its mask has not, or the form has
    grown too complex to be followed."""


class RankLostError(Qwen35Error):
    """A rank that has part of the model died, hangs or failed: nothing that was computed since is to be trusted."""


class EngineClosedError(Qwen35Error):
    """The engine was closed, and answers nothing any more."""
