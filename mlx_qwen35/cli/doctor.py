"""`doctor`: what a report about this machine has to say. Knows flags and output forms; the work is doctor.py's."""

from __future__ import annotations

import argparse
import json

DESCRIPTION = "Say what is known of this machine, MLX and the models on it: a block to paste into a report."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let the demo answer a question, in a process of its own",
    )
    parser.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True, help="read from the disk for a second"
    )
    parser.add_argument("--json", action="store_true", help="a JSON object in place of the lines; sizes in bytes")


def run(args: argparse.Namespace) -> int:
    from mlx_qwen35.cli.report import examine

    report = examine(demo=args.demo, disk=args.probe)
    print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2, default=str) if args.json else report)
    return 0
