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
        help="a folder, an LM Studio key or a Hugging Face name (default: the included demo)",
    )
    group.add_argument("--adapter-path", metavar="FOLDER", help="a LoRA adapter of mlx-lm, mlx-vlm or PEFT")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory limit, such as 24GB or 60%%; experts that do not fit are streamed from the disk (default: what "
        "this machine can give)",
    )
    group.add_argument(
        "--warm-start",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="with streamed experts: record which ones are in memory at the end, and preload them next time",
    )
    group.add_argument(
        "--exact",
        action="store_true",
        help="the same bits with drafts as without, and with streamed experts as with resident ones, on a GPU too; "
        "slower",
    )
    add_computing_arguments(group)
    ranks.add_rank_arguments(group)
    drafts = parser.add_argument_group("speculative decoding (changes the speed, not the answers; see --exact)")
    drafts.add_argument(
        "--mtp",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="draft with the model's own multi-token prediction head (default: no)",
    )
    drafts.add_argument(
        "--draft-model",
        metavar="NAME",
        help="draft with a small model, a DFlash or DFlash2 drafter, or a head split off by mlx-vlm",
    )
    drafts.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="draft at most N tokens at a time, 1 to 4 (default: 3); with a DFlash drafter up to 7 or 15, by its block "
        "size",
    )
    add_lookup_argument(drafts)


def add_lookup_argument(group: argparse._ActionsContainer) -> None:
    """Whether what was said before drafts, of all commands that answer."""
    group.add_argument(
        "--lookup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draft by copying what followed the same words earlier, where that is faster (default: yes)",
    )


def add_computing_arguments(group: argparse._ActionsContainer) -> None:
    """How a model computes, of all commands that load one."""
    group.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: float32 on a CPU, bfloat16 on a GPU)")
    group.add_argument("--context-length", type=int, metavar="N", help="limit of prompt and answer together, in tokens")
    group.add_argument(
        "--kernels",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="on a GPU, use this package's kernels if they pass a self-test, or only MLX's operations",
    )
    add_kv_arguments(group)


def add_kv_arguments(parser: argparse._ActionsContainer) -> None:
    """What decides about a cache, of `load` and of `estimate`."""
    parser.add_argument(
        "--yarn",
        action="store_true",
        help="scale positions for a --context-length above the native one, up to 1,010,000 tokens; makes all answers "
        "slightly worse, those to short prompts too",
    )
    parser.add_argument("--kv-bits", type=int, metavar="N", help="quantize the KV cache to 4 or 8 bits; not exact")
    parser.add_argument(
        "--kv-group-size", type=int, metavar="N", default=64, help="values per KV quantization group (default: 64)"
    )
    parser.add_argument(
        "--quantized-kv-start", type=int, metavar="N", default=0, help="positions left unquantized (default: 0)"
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
        help="reason before answering, or not (default: the template's)",
    )
    prompt.add_argument(
        "--reasoning-effort",
        metavar="WORD",
        help="none, minimal, low, medium, high, xhigh or max; mapped to the nearest that the template supports",
    )
    prompt.add_argument(
        "--preserve-thinking",
        action=argparse.BooleanOptionalAction,
        help="keep the reasoning of earlier turns in the prompt, or not (default: the template's)",
    )
    prompt.add_argument(
        "--chat-template-config",
        "--chat-template-args",
        metavar="JSON",
        help="other template variables, as a JSON object",
    )
    prompt.add_argument(
        "--allow-control-tokens",
        action="store_true",
        help="read <|im_start|> and the like in texts as control tokens, not as plain characters",
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
    media.add_argument("--fps", type=float, metavar="N", help="frames to use per second of video")
    media.add_argument("--max-pixels", type=int, metavar="N", help="scale each picture or frame down to N pixels")
    media.add_argument("--fetch", action="store_true", help="fetch http(s) URLs")
    answer = parser.add_argument_group("answer (defaults are those of the checkpoint's generation_config.json)")
    answer.add_argument(
        "-n",
        "-m",
        "--max-tokens",
        type=int,
        metavar="N",
        help="limit of the answer in tokens (default, and -1: the context)",
    )
    answer.add_argument(
        "--thinking-budget",
        type=int,
        metavar="N",
        help="end the reasoning after N tokens and go on to the answer (default: no limit)",
    )
    answer.add_argument("--temperature", "--temp", type=float, metavar="T", help="sampling temperature; 0 is greedy")
    answer.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the most likely tokens that add up to probability P"
    )
    answer.add_argument("--top-k", type=int, metavar="K", help="sample from the K most likely tokens (0: all)")
    answer.add_argument("--min-p", type=float, metavar="P", help="drop tokens below P times the largest probability")
    answer.add_argument(
        "--repetition-penalty", type=float, metavar="X", help="divide logits of earlier tokens by X (1: off)"
    )
    answer.add_argument(
        "--presence-penalty", type=float, metavar="X", help="subtract X from logits of earlier tokens (0: off)"
    )
    answer.add_argument(
        "--frequency-penalty", type=float, metavar="X", help="subtract X for each earlier occurrence (0: off)"
    )
    answer.add_argument("--seed", type=int, metavar="N", help="seed for reproducible sampling")
    answer.add_argument(
        "--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT (may be repeated)"
    )
    answer.add_argument("--extra-eos-token", nargs="+", default=[], metavar="TOKEN", help="also stop at these tokens")
    answer.add_argument("--prefill-step-size", type=int, metavar="N", help="prefill the prompt N tokens at a time")
    answer.add_argument(
        "--session",
        metavar="FILE",
        help="save the computed state (and a chat's messages) to FILE, and continue from it next time",
    )
    output = parser.add_argument_group("output")
    output.add_argument("--hide-thinking", action="store_true", help="print the answer without its reasoning")
    output.add_argument("--stats", action="store_true", help="print speed and memory to standard error")
    output.add_argument(
        "--expert-stats",
        action="store_true",
        help="print expert hits and disk reads to standard error",
    )
    output.add_argument(
        "-v",
        "--verbose",
        action="store_true",
        help="show loading, prefill and expert reads on standard error",
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
