"""`generate`: one prompt, one answer. Knows flags and output forms; the work is `stream_generate`'s."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import forms, opening, options, prompting
from mlx_qwen35.cli.cut import tell_cut
from mlx_qwen35.cli.demo import DEMO_PROMPT
from mlx_qwen35.cli.experts import ExpertLine
from mlx_qwen35.cli.stdin import read_prompt, tell_missed
from mlx_qwen35.machine.interrupt import Ending, Terminated, ending_on_signals, stop_on_ctrl_c
from mlx_qwen35.text.screen import Screen, call_record, statistics_record

if TYPE_CHECKING:
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.text.messages import MediaPart
    from mlx_qwen35.text.parts import Part

DESCRIPTION = "Answer one prompt."
INTERRUPTED = 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-p",
        "--prompt",
        action="append",
        default=[],
        metavar="TEXT",
        help="the prompt; may be repeated. Piped input is added after a blank line (</dev/null prevents that). - reads "
        "standard input and waits for it; otherwise a pipe that is silent for a second is ignored",
    )
    options.add_model_arguments(parser)
    options.add_answer_arguments(parser)
    forms.add_form_arguments(parser)
    parser.add_argument(
        "--cache-dir",
        metavar="FOLDER",
        help="keep computed prompts there (at most 32 GB, least recently used deleted first), so that later calls "
        "compute only what is new. Not with --session, which does the same for one chat",
    )
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="continue the raw prompt, without the chat template"
    )
    parser.add_argument(
        "--json",
        nargs="?",
        choices=("object", "lines"),
        const="object",
        help="print one JSON object at the end (--json), or one per event as it arrives (--json lines)",
    )


def run(args: argparse.Namespace) -> int:
    if (status := opening.follows(args)) is not None:
        return status
    with ending_on_signals() as ending, opening.locked_session(args):
        try:
            return _answer(args, ending)
        except Terminated as ended:
            return ended.status


def _answer(args: argparse.Namespace, ending: Ending) -> int:
    if args.ignore_chat_template and (args.system or args.tools or args.media):
        raise options.OptionError("--ignore-chat-template: --system, --tools, --image and --video need the template")
    if args.cache_dir is not None and args.session is not None:
        raise options.OptionError("--cache-dir and --session both keep what is computed: give one of them")
    text, unread = read_prompt(args.prompt)
    if text is None and (args.model is not None or args.media):
        raise options.OptionError("no prompt: give one with -p TEXT, or -p - to read it from standard input")
    form = forms.response_format(args)
    tools = prompting.read_tools(args.tools)
    told = prompting.prompt_options(args, tools)
    prompting.check_places(args)
    words = DEMO_PROMPT if text is None else text

    def question(processor: Processor) -> str | list[Any]:
        return processor.encode(words) if args.ignore_chat_template else _question(words, prompting.media_parts(args))

    held = opening.hold(args, prompting.prompt_check(told, question))
    processor = opening.load_processor(args, held)
    if text is None:
        print(f"No -p/--prompt: asking it {DEMO_PROMPT!r}", file=sys.stderr)
    prompt = processor.prompt(question(processor), **told.said)
    settings = options.answer_options(args, processor)
    forms.check(form, processor, tools)
    model = opening.load_model(args, held)
    opening.bound_to(processor, model)
    session = opening.open_session(args, model, processor)
    from mlx_qwen35.generation import stream_generate

    store = None
    if args.cache_dir is not None:
        from mlx_qwen35.session.store import Store

        store = Store(model, processor, most_bytes=model.snapshot_bytes, directory=os.path.expanduser(args.cache_dir))
    line = ExpertLine(args.verbose)
    output = {None: _Plain, "object": _Object, "lines": _Lines}[args.json](args.hide_thinking)
    answered = False
    settings |= {"tools": tools, "session": session, "store": store, "response_format": form}
    settings |= opening.draft_options(args, model)
    with stop_on_ctrl_c() as asked:
        try:
            for part in stream_generate(model, processor, prompt, cancel=asked, **settings):
                line.before()
                output.show(part)
                answered = answered or bool(part.content or part.tool_calls)
                line.after(part)
        except BaseException:
            line.before()
            output.abort()
            raise
        line.before()
        output.end(part)
    line.end(part)
    if args.json is None:  # which has the finish_reason
        tell_cut(part, settings["max_tokens"], "-n {more} gives it more room", answered=answered)
    if session is not None:
        with ending.deferred():
            session.save(args.session)
    if store is not None:
        with ending.deferred():
            store.close()
    ending.check()
    options.print_statistics(args, part)
    if unread:
        tell_missed()
    model.unload()
    return INTERRUPTED if part.finish_reason == "cancelled" else 0


def _question(text: str, media: list[MediaPart]) -> str | list[dict[str, Any]]:
    if not media:
        return text
    return [{"role": "user", "content": [*media, *([{"type": "text", "text": text}] if text else [])]}]


class _Plain:
    def __init__(self, hide_thinking: bool) -> None:
        self._screen = Screen(hide_thinking=hide_thinking)

    def show(self, part: Part) -> None:
        self._screen.show(part)

    def end(self, last: Part) -> None:
        self._screen.end()

    def abort(self) -> None:
        self._screen.end()


class _Object:
    """{"text", "reasoning", "content", "tool_calls", "finish_reason", "statistics"}, the first two unless hidden."""

    def __init__(self, hide_thinking: bool) -> None:
        self._parts: list[Part] = []
        self._names = ("content",) if hide_thinking else ("text", "reasoning", "content")

    def show(self, part: Part) -> None:
        self._parts.append(replace(part, logprobs=None))  # a megabyte a token

    def end(self, last: Part) -> None:
        record: dict[str, Any] = {name: "".join(getattr(part, name) for part in self._parts) for name in self._names}
        record["tool_calls"] = [call_record(call) for part in self._parts for call in part.tool_calls]
        _print_json({**record, "finish_reason": last.finish_reason, "statistics": statistics_record(last)})

    def abort(self) -> None:
        pass


class _Lines:
    """{"reasoning": ..}, {"content": ..} and {"tool_call": ..} as they come; at last finish_reason and statistics."""

    def __init__(self, hide_thinking: bool) -> None:
        self._names = ("content",) if hide_thinking else ("reasoning", "content")

    def show(self, part: Part) -> None:
        for name in self._names:
            if text := getattr(part, name):
                _print_json({name: text})
        for call in part.tool_calls:
            _print_json({"tool_call": call_record(call)})

    def end(self, last: Part) -> None:
        _print_json({"finish_reason": last.finish_reason, "statistics": statistics_record(last)})

    def abort(self) -> None:
        pass


def _print_json(record: dict[str, Any]) -> None:
    print(json.dumps(record, ensure_ascii=False), flush=True)
