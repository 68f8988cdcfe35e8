"""`convert`: a checkpoint of any layout into an MLX folder or a GGUF file. Knows flags; `conversion.convert` works."""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from pathlib import Path

from mlx_qwen35.cli.options import DTYPES, OptionError
from mlx_qwen35.cli.progress import Progress

DESCRIPTION = "Write a checkpoint as an MLX folder or a GGUF file, quantized or not."
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="the checkpoint: a folder or a name")
    parser.add_argument("target", nargs="?", metavar="TARGET", help="the folder to write, or NAME.gguf")
    parser.add_argument("--hf-path", metavar="SOURCE", help="the same as SOURCE, under mlx-lm's name")
    parser.add_argument("--mlx-path", metavar="TARGET", help="the same as TARGET, under mlx-lm's name")
    parser.add_argument(
        "--lmstudio", metavar="PUBLISHER/NAME", help="write into LM Studio's models folder under this name"
    )
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize; implied by any --q-... flag")
    parser.add_argument("--q-bits", type=int, metavar="N", help="bits per weight (default: 4)")
    parser.add_argument(
        "--q-group-size",
        type=int,
        metavar="N",
        help="weights per quantization group; with --target-size the smallest (default: 64)",
    )
    parser.add_argument("--q-mode", choices=MODES, help="affine (default), or a mode that fixes bits and group size")
    parser.add_argument(
        "--quant-predicate", metavar="RECIPE", help="bits by the role of each module: default, uniform, mixed_3_6, ..."
    )
    parser.add_argument(
        "--target-size", metavar="SIZE", help="choose the bits so that the checkpoint takes at most SIZE, such as 100GB"
    )
    parser.add_argument(
        "--outtype",
        metavar="TYPE",
        help="GGUF type: f32, f16, bf16, q8_0, q4_0, q4_1, mxfp4 (default: as in the file name, or bf16)",
    )
    parser.add_argument(
        "--pack-experts",
        action="store_true",
        help="add expert records for streaming; they take as much space as the experts",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of unquantized weights (default: as in the source)")
    parser.add_argument("--adapter-path", metavar="FOLDER", help="merge a LoRA adapter of mlx-lm, mlx-vlm or PEFT")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET, or what an interrupted run left")
    parser.add_argument(
        "--verify", action="store_true", help="read the result back and compare weights and logits with the source"
    )
    parser.add_argument("--resume", action="store_true", help="continue an interrupted conversion")


def run(args: argparse.Namespace) -> int:
    source = _one(args.source, args.hf_path, "SOURCE", "--hf-path")
    target = _target(args)
    size = None if args.target_size is None else _bytes(args.target_size)
    if size is not None and args.q_bits is not None:
        raise OptionError("--target-size chooses the bits and --q-bits says them; give one of them")
    quantizing = (args.q_bits, args.q_group_size, args.q_mode, args.quant_predicate, size)
    quantize = args.quantize or any(value is not None for value in quantizing)
    if quantize and target.endswith(".gguf"):
        raise OptionError("-q and --q-... are about MLX's forms; of a GGUF file say --outtype, as in --outtype q8_0")
    from mlx_qwen35.conversion.convert import unfinished
    from mlx_qwen35.library.converting import convert

    bits = 4 if args.q_bits is None else args.q_bits
    try:
        written = convert(
            source,
            target,
            bits=bits if quantize else None,
            group_size=64 if args.q_group_size is None else args.q_group_size,
            mode=args.q_mode or "affine",
            recipe=args.quant_predicate,
            target_size=size,
            dtype=args.dtype,
            pack_experts=args.pack_experts,
            outtype=args.outtype,
            adapter_path=args.adapter_path,
            overwrite=args.overwrite,
            resume=args.resume,
            verify=(lambda report: print(report, file=sys.stderr)) if args.verify else False,
            on_download=Progress("Downloading", "bytes"),
            on_progress=Progress("Converting", "bytes"),
            on_measure=Progress("Choosing bits", "modules"),
            on_note=lambda line: print(f"note: {line}", file=sys.stderr),
        )
    except KeyboardInterrupt:
        if unfinished(target):
            print(f"\nInterrupted; finished work is kept. Continue with:\n  {_go_on(args)}", file=sys.stderr)
        raise
    print(written)
    return 0


def _one(positional: str | None, named: str | None, place: str, flag: str) -> str:
    if positional is not None and named is not None and positional != named:
        raise OptionError(f"{place} is {positional} and {flag} is {named}; give one of them")
    given = positional if named is None else named
    if given is None:
        raise OptionError(f"no {place}: `mlx-qwen35 convert SOURCE TARGET`, or give {flag}")
    return given


def _target(args: argparse.Namespace) -> str:
    if args.lmstudio is None:
        return _one(args.target, args.mlx_path, "TARGET", "--mlx-path")
    if args.target is not None or args.mlx_path is not None:
        raise OptionError("TARGET and --lmstudio both say where to write; give one of them")
    parts = args.lmstudio.split("/")
    if len(parts) != 2 or not all(re.fullmatch(r"[\w@+-][\w.@+-]*", part) for part in parts):
        raise OptionError(f"--lmstudio is {args.lmstudio!r}; give two plain names, as in mlx-community/Qwen3.5-4B-4bit")
    from mlx_qwen35.library import lmstudio

    return str(Path(lmstudio.models_folder(), *parts))


def _bytes(text: str) -> int:
    from mlx_qwen35.library.plan import parse_size

    try:
        return parse_size(text, fewest=1000)
    except ValueError as error:
        raise OptionError(f"--target-size: {error}") from error


def _go_on(args: argparse.Namespace) -> str:
    """The command that goes on with this one."""
    words = ["mlx-qwen35", "convert"]
    for name, value in vars(args).items():
        flag = ["-q"] if name == "quantize" else [f"--{name.replace('_', '-')}"]
        if name in ("run", "parser", "resume") or value in (None, False):
            continue
        words += [value] if name in ("source", "target") else flag if value is True else [*flag, str(value)]
    return shlex.join([*words, "--resume"])
