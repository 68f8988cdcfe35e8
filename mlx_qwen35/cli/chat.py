"""`chat`: a conversation in the terminal. Knows its messages, its commands and its keys.

Answers are `stream_generate`'s. A finished or stopped answer joins the messages; what was computed for it is kept as
long as the next prompt goes on from it (timeline.py), and what was seen as long as there is room.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import options
from mlx_qwen35.cli.interrupt import stop_on_ctrl_c
from mlx_qwen35.cli.screen import Screen, call_record
from mlx_qwen35.cli.timeline import Timeline
from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.messages import MediaPart

if TYPE_CHECKING:
    from mlx_qwen35.model import Model
    from mlx_qwen35.parts import Part
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.vision.media import Media

DESCRIPTION = "Talk with a model."
HELP = (
    "/image FILE and /video FILE show one with the next message, /reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C "
    "ends an answer; anything else is a message."
)
SHOW = {"/image": "image", "/video": "video"}
TURN_START = "<|im_start|>"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_answer_arguments(parser)


def run(args: argparse.Namespace) -> int:
    tools = options.read_tools(args.tools)
    processor = options.load_processor(args)
    reading = options.reading_options(args)
    shown = [_read(processor, part, reading) for part in options.media_parts(args)]
    talk = Conversation(
        options.load_model(args),
        processor,
        system=args.system,
        tools=tools,
        enable_thinking=args.think,
        reading=reading,
        settings=options.answer_options(args, processor),
    )
    talk.shown += shown
    _converse(talk, stats=args.stats)
    return 0


def _converse(talk: Conversation, *, stats: bool) -> None:
    """Reads lines and answers them, until the input ends, /exit, or Ctrl-C after something was given up already."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  - editing and history for input()
        print(HELP, file=sys.stderr)
    given_up = False
    while True:
        label = "tool result> " if talk.waits_for_tool else "> "
        try:
            line = input(label if at_terminal else "")
        except EOFError:
            break
        except UnicodeDecodeError as error:
            raise PromptError(f"the input is no text ({error}); give UTF-8") from error
        except KeyboardInterrupt:
            if given_up:
                break
            given_up = True
            print("\nCtrl-C again leaves.", file=sys.stderr)
            continue
        given_up = False
        command, _, rest = line.strip().partition(" ")
        if line.strip() == "/exit":
            return
        if command in SHOW:
            given_up = _show(talk, SHOW[command], rest.strip())
        elif line.strip() == "/reset":
            talk.reset()
        elif line.strip() == "/help":
            print(HELP, file=sys.stderr)
        elif line.strip():
            given_up = _answer(talk, line, stats)
    if at_terminal:
        print()


def _show(talk: Conversation, kind: str, file: str) -> bool:
    """Reads what the next message is to show; returns whether Ctrl-C ended it."""
    try:
        if not file:
            raise PromptError(f"no file; write /{kind} FILE")
        medium = talk.show(kind, _unquoted(file))
    except PromptError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return True
    else:
        print(f"The next message shows this {kind} ({medium.tokens} tokens).", file=sys.stderr)
    return False


def _unquoted(file: str) -> str:
    """The file as it was meant: one that is dropped on a terminal comes with quotes or backslashes."""
    if not os.path.exists(os.path.expanduser(file)):
        with suppress(ValueError):
            words = shlex.split(file)
            if len(words) == 1:
                return words[0]
    return file


def _read(processor: Processor, part: MediaPart, reading: dict[str, Any]) -> dict[str, Any]:
    """A part of a message with the picture or video itself in place of its source."""
    (message,) = processor.prepare([{"role": "user", "content": [part]}], **reading)
    return message["content"][0]


def _answer(talk: Conversation, line: str, stats: bool) -> bool:
    """Shows the answer to one line; returns whether Ctrl-C ended it."""
    from mlx_qwen35.generation import statistics

    screen = Screen()
    try:
        last = talk.answer(line, screen)
    except PromptError as error:
        print(f"error: {error}", file=sys.stderr)
        if talk.shown:  # or the next message would fail with it too
            talk.shown.clear()
            print("What the message was to show is dropped with it.", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        screen.end()
    if stats:
        print(statistics(last), file=sys.stderr)
    return last.finish_reason == "cancelled"


class Conversation:
    """Messages, and the timeline that was computed for them. `shown`: pictures and videos of the next message."""

    def __init__(
        self,
        model: Model,
        processor: Processor,
        *,
        system: str | None,
        tools: list[dict[str, Any]],
        enable_thinking: bool | None,
        reading: dict[str, Any],
        settings: dict[str, Any],
    ) -> None:
        from mlx_qwen35.vision.features import FeatureStore

        self._model, self._processor = model, processor
        self._system, self._tools, self._enable_thinking = system, tools, enable_thinking
        self._reading, self._settings = reading, settings
        self._features = FeatureStore()
        self._turn_start = processor.tokenizer.token_id(TURN_START)
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.shown: list[dict[str, Any]] = []
        self._timeline = Timeline(self._model)

    @property
    def waits_for_tool(self) -> bool:
        return bool(self.messages and self.messages[-1].get("tool_calls"))

    def show(self, kind: str, source: str) -> Media:
        """Reads what the next message shows."""
        part = _read(self._processor, MediaPart(kind, source, f"/{kind}"), self._reading)
        self.shown.append(part)
        return part[kind]

    def answer(self, line: str, screen: Screen) -> Part:
        """Answers a line (a user's message, or the result of the tool that the model has called); -> the last part.

        Question and answer join the messages, also where the answer was interrupted after it had begun.
        """
        from mlx_qwen35.generation import stream_generate

        content = [*self.shown, {"type": "text", "text": line}] if self.shown else line
        question = {"role": "tool" if self.waits_for_tool else "user", "content": content}
        prompt = self._processor.prompt(
            [*self.messages, question],
            system=self._system,
            tools=self._tools or None,
            enable_thinking=self._enable_thinking,
        )
        timeline = self._timeline
        covered = timeline.go_on(prompt)
        to_mark = self._last_turn(prompt.tokens) - covered
        show_progress = self._settings["on_progress"]

        def on_progress(done: int, total: int) -> None:
            if done == to_mark:
                timeline.mark()
            if show_progress:
                show_progress(done, total)

        parts: list[Part] = []
        try:
            with stop_on_ctrl_c() as asked:
                stream = stream_generate(
                    self._model,
                    self._processor,
                    prompt,
                    tools=self._tools,
                    cache=timeline.cache,
                    covered=covered,
                    features=self._features,
                    boundaries=[to_mark],
                    cancel=asked,
                    **{**self._settings, "on_progress": on_progress},
                )
                for part in stream:
                    parts.append(replace(part, logprobs=None))  # a megabyte a token
                    screen.show(part)
        finally:
            answered = [part.token for part in parts if part.token is not None]
            timeline.settle([*prompt.tokens, *answered])
            if answered:
                self.messages += [question, _message(parts)]
                self.shown = []
        return parts[-1]

    def _last_turn(self, tokens: list[int]) -> int:
        """Where the turn begins that the model is to write; 0 where it cannot be told."""
        turns = [at for at, token in enumerate(tokens) if token == self._turn_start]
        return turns[-1] if turns else 0


def _message(parts: list[Part]) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": "".join(part.content for part in parts)}
    if reasoning := "".join(part.reasoning for part in parts):
        message["reasoning_content"] = reasoning
    if calls := [call for part in parts for call in part.tool_calls]:
        message["tool_calls"] = [{"type": "function", "function": call_record(call)} for call in calls]
    return message
