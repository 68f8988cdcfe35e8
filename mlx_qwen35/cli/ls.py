"""`ls`: what models are on this machine. Knows flags and output forms; the work is `library.list_models`'s."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict

DESCRIPTION = "List the Qwen3.5, 3.6 and 3.8 models on this machine and the names to load them by."

EXAMPLE = "Qwen/Qwen3.5-4B"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folders", nargs="*", metavar="FOLDER", help="also look here: a checkpoint, or a folder of checkpoints"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def run(args: argparse.Namespace) -> int:
    from mlx_qwen35.library.finding import DEMO
    from mlx_qwen35.library.listing import list_models

    models = list_models(*args.folders)
    if args.json:
        records = [{**asdict(model), "folder": str(model.folder), "complete": model.complete} for model in models]
        print(json.dumps(records, ensure_ascii=False, indent=2))
    else:
        print(models)
        if all(model.name == DEMO for model in models):
            print(f"There are no other models. {EXAMPLE}, for example, is downloaded when first used.", file=sys.stderr)
    return 0
