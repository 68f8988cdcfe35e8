"""`convert`: a checkpoint of any layout into an MLX folder. Knows flags; the work is `checkpoint.convert`'s."""

from __future__ import annotations

import argparse

from mlx_qwen35.cli.options import DTYPES, OptionError
from mlx_qwen35.cli.progress import Progress

DESCRIPTION = "Write a checkpoint as an MLX folder, quantized or not."
MODES = ("affine", "mxfp4", "mxfp8", "nvfp4")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="?", metavar="SOURCE", help="the folder of the checkpoint")
    parser.add_argument("target", nargs="?", metavar="TARGET", help="the folder to write")
    parser.add_argument("--hf-path", metavar="SOURCE", help="the same as SOURCE, under mlx-lm's name")
    parser.add_argument("--mlx-path", metavar="TARGET", help="the same as TARGET, under mlx-lm's name")
    parser.add_argument("-q", "--quantize", action="store_true", help="quantize; any --q-... flag means it too")
    parser.add_argument("--q-bits", type=int, metavar="N", help="bits a weight (default: 4)")
    parser.add_argument("--q-group-size", type=int, metavar="N", help="weights that share a scale (default: 64)")
    parser.add_argument("--q-mode", choices=MODES, help="affine (default), or a mode that fixes both")
    parser.add_argument("--dtype", choices=DTYPES, help="of what is not quantized (default: as in the source)")
    parser.add_argument("--overwrite", action="store_true", help="replace TARGET if it exists")


def run(args: argparse.Namespace) -> int:
    source = _one(args.source, args.hf_path, "SOURCE", "--hf-path")
    target = _one(args.target, args.mlx_path, "TARGET", "--mlx-path")
    from mlx_qwen35.checkpoint.convert import convert

    quantize = args.quantize or any(v is not None for v in (args.q_bits, args.q_group_size, args.q_mode))
    bits = 4 if args.q_bits is None else args.q_bits
    written = convert(
        source,
        target,
        bits=bits if quantize else None,
        group_size=64 if args.q_group_size is None else args.q_group_size,
        mode=args.q_mode or "affine",
        dtype=args.dtype,
        overwrite=args.overwrite,
        on_progress=Progress("Converting", "bytes"),
    )
    print(written)
    return 0


def _one(positional: str | None, named: str | None, place: str, flag: str) -> str:
    if positional is not None and named is not None and positional != named:
        raise OptionError(f"{place} is {positional} and {flag} is {named}; give one of them")
    given = positional if named is None else named
    if given is None:
        raise OptionError(f"no {place}: `mlx-qwen35 convert SOURCE TARGET`, or give {flag}")
    return given
