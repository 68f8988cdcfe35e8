"""What the flags say of an answer's form. Knows files and texts; what they mean is the grammar's business."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli.options import OptionError
from mlx_qwen35.errors import ArgumentError

if TYPE_CHECKING:
    from mlx_qwen35.processor import Processor


def add_form_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("structured answers (reasoning is not constrained)")
    choice = group.add_mutually_exclusive_group()
    choice.add_argument(
        "--json-schema",
        metavar="FILE",
        help='JSON by this schema: a file, or the schema itself (\'{"type": "object"}\' is any object)',
    )
    choice.add_argument("--regex", metavar="PATTERN", help="text that matches completely")
    choice.add_argument(
        "--grammar", metavar="FILE", help="a grammar file: GBNF if its name ends with .gbnf, else llguidance's Lark"
    )


def response_format(args: argparse.Namespace) -> Any:
    """As `stream_generate` takes it; None where the flags ask for none. Raises OptionError for what can be seen to be
    no form without a tokenizer."""
    if args.json_schema is not None:
        flag, value = "--json-schema", _schema(args.json_schema)
    elif args.regex is not None:
        flag, value = "--regex", {"type": "regex", "pattern": args.regex}
    elif args.grammar is not None:
        kind = "gbnf" if args.grammar.lower().endswith(".gbnf") else "grammar"
        flag, value = "--grammar", {"type": kind, "grammar": _read("--grammar", args.grammar)}
    else:
        return None
    from mlx_qwen35.grammar.forms import form

    try:
        form(value)
    except ArgumentError as error:
        raise OptionError(f"{flag}: {error}") from error
    return value


def check(form: Any, processor: Processor, tools: list[dict[str, Any]]) -> None:
    """Raises ArgumentError for a form that this tokenizer cannot follow, before weights are read; what is made of it is
    kept for the answer."""
    if form is not None:
        from mlx_qwen35.grammar import Grammar

        Grammar.of(processor, tools=tools, response_format=form)


def _schema(given: str) -> dict[str, Any]:
    """Always named, so that no property of a schema is taken for the name of another form."""
    inside = given.lstrip().startswith("{")
    text = given if inside else _read("--json-schema", given)
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        what = "the text" if inside else given
        raise OptionError(f"--json-schema: {what} is not valid JSON ({error})") from error
    return {"type": "json_schema", "json_schema": {"schema": schema}}


def _read(flag: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise OptionError(f"{flag}: {path} cannot be read ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise OptionError(f"{flag}: {path} is not text in UTF-8; check the path") from error
