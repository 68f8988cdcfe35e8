"""`doctor`: what a report about this machine has to say. Knows flags and output forms; the work is doctor.py's."""

from __future__ import annotations

import argparse
import json

DESCRIPTION = "Describe this machine, MLX and its models, for a bug report."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--demo",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the demo a question, in a separate process",
    )
    parser.add_argument(
        "--probe", action=argparse.BooleanOptionalAction, default=True, help="measure the disk for a second"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON object; sizes in bytes")


def run(args: argparse.Namespace) -> int:
    from mlx_qwen35.cli.report import examine

    report = examine(demo=args.demo, disk=args.probe)
    print(json.dumps(report.as_dict(), ensure_ascii=False, indent=2, default=str) if args.json else report)
    return 0
