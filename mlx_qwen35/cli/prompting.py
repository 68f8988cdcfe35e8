"""What the flags say of a prompt: tools, pictures, what the template is told. Knows nothing of models and answers."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli.options import OptionError
from mlx_qwen35.text.messages import MediaPart

if TYPE_CHECKING:
    from mlx_qwen35.request import PromptOptions


def prompt_options(args: argparse.Namespace, tools: list[dict[str, Any]]) -> PromptOptions:
    """What the template is told, and how pictures and videos are read. Raises OptionError."""
    from mlx_qwen35.request import PromptOptions

    return PromptOptions(
        system=args.system,
        tools=tools,
        enable_thinking=args.think,
        reasoning_effort=args.reasoning_effort,
        preserve_thinking=args.preserve_thinking,
        chat_template_kwargs=_variables(args),
        allow_control_tokens=args.allow_control_tokens,
        fps=args.fps,
        max_pixels=args.max_pixels,
        fetch=args.fetch,
    )


def media_parts(args: argparse.Namespace) -> list[MediaPart]:
    """What the flags show, as parts of a message's content."""
    return [MediaPart(kind, source, f"--{kind}") for kind, source in args.media]


def read_tools(path: str | None) -> list[dict[str, Any]]:
    if path is None:
        return []
    try:
        with open(path, encoding="utf-8") as file:
            tools = json.load(file)
    except OSError as error:
        raise OptionError(f"--tools: {path} cannot be read ({error.strerror}); check the path") from error
    except (ValueError, RecursionError) as error:
        raise OptionError(f"--tools: {path} is not valid JSON ({error})") from error
    if not isinstance(tools, list):
        raise OptionError(f"--tools: {path} holds no JSON list; write [{{...}}, ...]")
    return tools


def _variables(args: argparse.Namespace) -> dict[str, Any] | None:
    """The variables of the template that the flags give; None where they give none."""
    if args.chat_template_config is None:
        return None
    try:
        variables = json.loads(args.chat_template_config)
    except (ValueError, RecursionError) as error:
        raise OptionError(
            f"--chat-template-config is not valid JSON ({error}); write '{{\"preserve_thinking\": true}}', say"
        ) from error
    if not isinstance(variables, dict):
        raise OptionError("--chat-template-config is no JSON object; write '{\"preserve_thinking\": true}', say")
    return variables
