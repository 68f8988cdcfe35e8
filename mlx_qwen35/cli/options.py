"""The flags that generate and chat share, and what they mean for an answer.

Knows flag names and how they become arguments of `stream_generate`. What they name is opened in opening.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import experts, ranks
from mlx_qwen35.cli.progress import Progress
from mlx_qwen35.errors import Qwen35Error

if TYPE_CHECKING:
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.text.parts import Part

DTYPES = ("float32", "float16", "bfloat16")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_FLAGS = ("temperature", "top_p", "top_k", "min_p", *_PENALTIES, "seed")


class OptionError(Qwen35Error):
    """A flag has a value that means nothing."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        metavar="NAME",
        help="a folder, or a name as LM Studio or the Hugging Face Hub has it (default: the demo inside the package)",
    )
    group.add_argument("--adapter-path", metavar="FOLDER", help="a LoRA adapter, as mlx-lm's trainer writes it")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="the most that may be taken, such as 24GB or 60%%: experts that do not fit are read from the disk when "
        "they are chosen (default: what this machine has for it)",
    )
    group.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where experts are read from the disk: note at the end which are in memory, and begin with them next time",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="give drafted tokens the bits that they have alone, and streamed experts those of resident ones, on a GPU "
        "too; slower",
    )
    add_computing_arguments(group)
    ranks.add_rank_arguments(group)
    drafts = parser.add_argument_group("drafts (how fast tokens come, not which; see --exact)")
    drafts.add_argument(
        "--mtp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="let the model's own multi-token-prediction head draft (default: no)",
    )
    drafts.add_argument(
        "--draft-model",
        metavar="NAME",
        help="let a small model draft, a DFlash or DFlash2 drafter, or a head split off by mlx-vlm",
    )
    drafts.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="at most N at a time, 1 to 4 (default: 3), of a DFlash drafter up to its block's 7 or 15",
    )
    add_lookup_argument(drafts)


def add_lookup_argument(group: argparse._ActionsContainer) -> None:
    """Whether what was said before drafts, of all commands that answer."""
    group.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="copy what followed when the same words stood there before, where that is faster (default: yes)",
    )


def add_computing_arguments(group: argparse._ActionsContainer) -> None:
    """How a model computes, of all commands that load one."""
    group.add_argument("--dtype", choices=DTYPES, help="compute in it (default: float32 on a CPU, bfloat16 on a GPU)")
    group.add_argument("--context-length", type=int, metavar="N", help="the most tokens of prompt and answer together")
    group.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, take this package's kernels where they stand a short test, or MLX's operations alone",
    )
    add_kv_arguments(group)


def add_kv_arguments(parser: argparse._ActionsContainer) -> None:
    """What decides about a cache, of `load` and of `estimate`."""
    parser.add_argument(
        "--yarn",
        action="store_true",
        help="stretch positions for a --context-length above the model's own, up to 1,010,000 tokens; changes all "
        "answers, those to short prompts a little for the worse",
    )
    parser.add_argument("--kv-bits", type=int, metavar="N", help="keep keys and values in 4 or 8 bits: not exact")
    parser.add_argument("--kv-group-size", type=int, metavar="N", default=64, help="values a scale (default: 64)")
    parser.add_argument(
        "--quantized-kv-start", type=int, metavar="N", default=0, help="positions kept as they are (default: 0)"
    )


def kv_options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `load` and `estimate`."""
    return {name: getattr(args, name) for name in ("yarn", "kv_bits", "kv_group_size", "quantized_kv_start")}


def add_answer_arguments(parser: argparse.ArgumentParser) -> None:
    prompt = parser.add_argument_group("prompt")
    prompt.add_argument("--system", "--system-prompt", metavar="TEXT", help="the system message")
    prompt.add_argument("--tools", metavar="FILE", help="a JSON list of tools that the model may call")
    prompt.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        help="let the model reason before it answers, or not (default: what its template says)",
    )
    prompt.add_argument(
        "--reasoning-effort",
        metavar="WORD",
        help="none, minimal, low, medium, high, xhigh or max: the nearest that the template knows",
    )
    prompt.add_argument(
        "--preserve-thinking",
        action=argparse.BooleanOptionalAction,
        help="show the model the reasoning of earlier turns, or not (default: what its template says)",
    )
    prompt.add_argument(
        "--chat-template-config",
        "--chat-template-args",
        metavar="JSON",
        help="other variables of the template, as a JSON object",
    )
    prompt.add_argument(
        "--allow-control-tokens",
        action="store_true",
        help="let <|im_start|> and the like in texts be control tokens, not the characters that they are",
    )
    media = parser.add_argument_group("pictures and videos (shown before the text, in this order; may be repeated)")
    for kind in ("image", "video"):
        media.add_argument(
            f"--{kind}",
            dest="media",
            action="append",
            default=[],
            type=partial(_medium, kind),
            metavar="FILE",
            help=f"show this {kind}: a path, a data: URL, or with --fetch an http(s) URL",
        )
    media.add_argument("--fps", type=float, metavar="N", help="frames to take from a second of video")
    media.add_argument("--max-pixels", type=int, metavar="N", help="scale each picture or frame down to N pixels")
    media.add_argument("--fetch", action="store_true", help="get http(s) URLs from the network")
    answer = parser.add_argument_group("answer (defaults are those of the checkpoint's generation_config.json)")
    answer.add_argument(
        "-n",
        "-m",
        "--max-tokens",
        type=int,
        metavar="N",
        help="end after N tokens (default, and -1: when the context is full)",
    )
    answer.add_argument(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="close the reasoning after N tokens, so that the answer follows (default: no budget)",
    )
    answer.add_argument("--temperature", "--temp", type=float, metavar="T", help="0 always takes the likeliest token")
    answer.add_argument("--top-p", type=float, metavar="P", help="draw from the likeliest tokens that make up P")
    answer.add_argument("--top-k", type=int, metavar="K", help="draw from the K likeliest tokens (0: all)")
    answer.add_argument("--min-p", type=float, metavar="P", help="only tokens with P times the largest probability")
    answer.add_argument("--repetition-penalty", type=float, metavar="X", help="divide what came before by X (1: off)")
    answer.add_argument("--presence-penalty", type=float, metavar="X", help="subtract X from what was said (0: off)")
    answer.add_argument("--frequency-penalty", type=float, metavar="X", help="the same for each time that it was said")
    answer.add_argument("--seed", type=int, metavar="N", help="draw the same tokens every time")
    answer.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end before TEXT (may be repeated)")
    answer.add_argument("--extra-eos-token", nargs="+", default=[], metavar="TOKEN", help="end at these tokens, too")
    answer.add_argument("--prefill-step-size", type=int, metavar="N", help="read the prompt N tokens at a time")
    answer.add_argument(
        "--session",
        metavar="FILE",
        help="keep what was computed (and, in a chat, said) in FILE and go on from it next time: nothing is read twice",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--hide-thinking", action="store_true", help="print the answer without the reasoning before it")
    output.add_argument("--stats", action="store_true", help="print speed and memory on standard error")
    output.add_argument(
        "--expert-stats",
        action="store_true",
        help="print on standard error which experts were in memory and what was read from the disk",
    )
    output.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show loading, prefill and the reading of experts on standard error",
    )


def check_sampling(args: argparse.Namespace) -> None:
    """Refuses a value before anything is loaded."""
    from mlx_qwen35.sampling import Sampling

    try:
        Sampling(**_given(args))
    except ValueError as error:
        raise OptionError(str(error)) from error
    for name, least, rule in _WHOLE:
        value = getattr(args, name)
        if value is not None and value < least:
            raise OptionError(f"--{name.replace('_', '-')} is {value}; it must be {rule}")


_WHOLE = (
    ("max_tokens", -1, "0 or more, or -1 for all that the context leaves"),
    ("thinking_budget", 0, "0 or more"),
    ("prefill_step_size", 1, "1 or more"),
)


def answer_options(args: argparse.Namespace, processor: Processor) -> dict[str, Any]:
    """The arguments of `stream_generate` that the flags give, but for the prompt's own (system, tools, thinking)."""
    from mlx_qwen35.sampling import Sampling

    return {
        "max_tokens": None if args.max_tokens == -1 else args.max_tokens,
        "thinking_budget": args.thinking_budget,
        "sampling": replace(Sampling.from_generation_config(processor.generation_config), **_given(args)),
        "stop": args.stop,
        "chunk_size": args.prefill_step_size,
        "on_progress": progress_of(args, "Reading the prompt", "tokens"),
    }


def progress_of(args: argparse.Namespace, doing: str, unit: str) -> Callable[[int, int], None] | None:
    return Progress(doing, unit) if args.verbose else None


def print_statistics(args: argparse.Namespace, part: Part) -> None:
    """What the flags ask to be told under an answer; part: its last."""
    from mlx_qwen35.generation import statistics

    if args.stats:
        print(statistics(part), file=sys.stderr)
    if args.expert_stats:
        print(experts.table(part), file=sys.stderr)


def _medium(kind: str, source: str) -> tuple[str, str]:
    return kind, source


def _given(args: argparse.Namespace) -> dict[str, Any]:
    values = {name: getattr(args, name) for name in SAMPLING_FLAGS}
    return {name: value for name, value in values.items() if value is not None}
