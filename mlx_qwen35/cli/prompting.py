"""What the flags say of a prompt: tools, pictures, what the template is told. Knows nothing of models and answers."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli.options import OptionError
from mlx_qwen35.errors import PromptError
from mlx_qwen35.text.messages import MediaPart
from mlx_qwen35.text.variables import check_effort

if TYPE_CHECKING:
    from mlx_qwen35.cli.opening import CheckOffer
    from mlx_qwen35.engine.allowed import PromptOptions
    from mlx_qwen35.library.hub import Offer
    from mlx_qwen35.processor import Processor


def prompt_options(args: argparse.Namespace, tools: list[dict[str, Any]]) -> PromptOptions:
    """What the template is told, and how pictures and videos are read. Raises OptionError."""
    from mlx_qwen35.engine.allowed import PromptOptions

    check_effort(args.reasoning_effort)
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


def check_places(args: argparse.Namespace) -> None:
    """Raises PromptError where nothing is at a place that the flags show, before a model is looked for."""
    from mlx_qwen35.vision.sources import open_source

    for part in media_parts(args):
        if not _is_fetched(args, part):
            try:
                open_source(part.source, "picture" if part.kind == "image" else part.kind)
            except PromptError as error:
                raise PromptError(f"{part}: {error}") from error


def prompt_check(told: PromptOptions, question: Callable[[Processor], Any]) -> CheckOffer:
    """What is asked of a checkpoint before it is downloaded: whether it can see what it is to see, and, with its small
    files, whether there is a prompt. question: what the prompt is made of."""

    def check(args: argparse.Namespace, offer: Offer) -> None:
        from mlx_qwen35.library import load_processor

        _check_media(args, offer)
        if any(_is_fetched(args, part) for part in media_parts(args)):
            return
        processor = load_processor(offer.small_files(), context_length=args.context_length, yarn=args.yarn)
        processor.prompt(question(processor), **told.said)

    return check


def _check_media(args: argparse.Namespace, offer: Offer) -> None:
    """Raises PromptError for what cannot be read or seen. What lies on the network is left for later, so that it is
    fetched once."""
    from mlx_qwen35.vision.images import open_image
    from mlx_qwen35.vision.video import check_video

    for part in media_parts(args):
        if offer.config.vision is None:
            raise PromptError(f"{part} cannot be seen by {offer.name}, which has no vision tower: give it text only")
        if _is_fetched(args, part):
            continue
        try:
            (open_image if part.kind == "image" else check_video)(part.source)
        except PromptError as error:
            raise PromptError(f"{part}: {error}") from error


def _is_fetched(args: argparse.Namespace, part: MediaPart) -> bool:
    return args.fetch and str(part.source).lower().startswith(("http://", "https://"))


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
