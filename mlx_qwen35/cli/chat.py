"""`chat`: a conversation in the terminal. Knows its commands and its keys; what is said is conversation.py's."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from contextlib import suppress
from typing import TYPE_CHECKING

from mlx_qwen35.cli import options
from mlx_qwen35.cli.experts import ExpertLine
from mlx_qwen35.errors import PromptError
from mlx_qwen35.screen import Screen

if TYPE_CHECKING:
    from mlx_qwen35.conversation import Conversation
    from mlx_qwen35.parts import Part

DESCRIPTION = "Talk with a model."
HELP = (
    "/image FILE and /video FILE show one with the next message, /reset begins anew, /exit (or Ctrl-D) leaves, Ctrl-C "
    "ends an answer; anything else is a message."
)
SHOW = {"/image": "image", "/video": "video"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options.add_model_arguments(parser)
    options.add_answer_arguments(parser)


def run(args: argparse.Namespace) -> int:
    tools = options.read_tools(args.tools)
    held = options.hold(args)
    processor = options.load_processor(held)
    reading = options.reading_options(args)
    shown = processor.prepare([{"role": "user", "content": options.media_parts(args)}], **reading)[0]["content"]
    from mlx_qwen35.conversation import Conversation

    model = options.load_model(args, held)
    talk = Conversation(
        model,
        processor,
        system=args.system,
        tools=tools,
        enable_thinking=args.think,
        reading=reading,
        settings=options.answer_options(args, processor) | options.draft_options(args, model),
        session=options.open_session(args, model, processor),
    )
    talk.shown += shown
    try:
        _converse(talk, args)
    finally:
        if args.session is not None:
            talk.save(args.session)
    model.unload()
    return 0


def _converse(talk: Conversation, args: argparse.Namespace) -> None:
    """Reads lines and answers them, until the input ends, /exit, or Ctrl-C after something was given up already."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  - editing and history for input()
        print(HELP, file=sys.stderr)
    given_up = False
    while True:
        label = "tool result> " if talk.calls else "> "
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
            given_up = _answer(talk, line, args)
    if at_terminal:
        print()


def _show(talk: Conversation, kind: str, file: str) -> bool:
    """Reads what the next message is to show; returns whether Ctrl-C ended it."""
    try:
        if not file:
            raise PromptError(f"no file; write /{kind} FILE")
        part = talk.read(kind, _unquoted(file), f"/{kind}")
        talk.shown.append(part)
    except PromptError as error:
        print(f"error: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return True
    else:
        print(f"The next message shows this {kind} ({part[kind].tokens} tokens).", file=sys.stderr)
    return False


def _unquoted(file: str) -> str:
    """The file as it was meant: one that is dropped on a terminal comes with quotes or backslashes."""
    if not os.path.exists(os.path.expanduser(file)):
        with suppress(ValueError):
            words = shlex.split(file)
            if len(words) == 1:
                return words[0]
    return file


def _answer(talk: Conversation, line: str, args: argparse.Namespace) -> bool:
    """Shows the answer to one line; returns whether Ctrl-C ended it."""
    screen, below, last = Screen(), ExpertLine(args.verbose), None

    def show(part: Part) -> None:
        below.before()
        screen.show(part)
        below.after(part)

    try:
        *_, last = talk.answer([talk.question(line)], show)
    except PromptError as error:
        print(f"error: {error}", file=sys.stderr)
        if talk.shown:  # or the next message would fail with it too
            talk.shown.clear()
            print("What the message was to show is dropped with it.", file=sys.stderr)
        return False
    except KeyboardInterrupt:
        return True
    finally:
        below.before()
        screen.end()
        below.end(last)
    options.print_statistics(args, last)
    return last.finish_reason == "cancelled"
