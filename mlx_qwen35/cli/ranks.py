"""The flags for a model on several ranks, and what a process does that is not rank 0.

Knows flags and the environment that `mlx.launch` makes. The work is library/ranked.py's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.errors import ArgumentError
from mlx_qwen35.parallel.place import place_of

if TYPE_CHECKING:
    from mlx_qwen35.library.portions import Options

_OWN = {"memory": None, "adapter_path": None, "warm_start": True}  # what each rank has of its own, if a command has it


def add_rank_arguments(group: argparse._ActionsContainer) -> None:
    """Of all commands that load a model."""
    group.add_argument(
        "--ranks",
        type=int,
        metavar="N",
        help="split the model over N processes of this machine, which share --memory; mlx.launch splits it over "
        "machines without this flag (docs/DISTRIBUTED.md)",
    )
    group.add_argument(
        "--plan",
        choices=("experts", "pipeline", "tensor"),
        help="how to split it over ranks (default: of the plans that fit, the one modelled as fastest)",
    )


def count_of(args: argparse.Namespace) -> int:
    """On how many ranks the model is to be; 1: in this process alone. Raises ArgumentError for what makes no sense."""
    place = place_of()
    if args.ranks is not None and args.ranks < 1:
        raise ArgumentError(f"--ranks is {args.ranks}; it must be 1 or more")
    if place is not None and args.ranks not in (None, place.ranks):
        raise ArgumentError(f"--ranks is {args.ranks}, but {place.ranks} were launched: leave it out")
    count = place.ranks if place is not None else args.ranks or 1
    if count == 1 and args.plan is not None:
        raise ArgumentError("--plan says how a model is cut over ranks: add --ranks N, or start with mlx.launch")
    return count


def options_of(args: argparse.Namespace, chosen: dict[str, Any]) -> Options:
    """What all ranks are to have alike. chosen: dtype, context_length, yarn and kv_form, as `hold` takes them."""
    from mlx_qwen35.library import portions

    return portions.options_of(**chosen, exact=args.exact, kernels=args.kernels, plan=args.plan)


def follows(args: argparse.Namespace, find: Callable[[], Path], chosen: dict[str, Any]) -> int | None:
    """The exit status of a process that `mlx.launch` started as another rank than 0, when rank 0 has ended; None: this
    is rank 0, or alone. find(): the folder of the checkpoint; chosen: as in `options_of`."""
    place = place_of()
    if place is None or place.rank == 0:
        return None
    count_of(args)
    from mlx_qwen35.library.ranked import follow

    told = {name: getattr(args, name, default) for name, default in _OWN.items()}
    return follow(find(), options_of(args, chosen), **told)


def tell_plan(model: Any) -> None:
    """Which rank has what, and why it was cut so."""
    print(f"{model.plan}\n{model.plan.why}", file=sys.stderr)

