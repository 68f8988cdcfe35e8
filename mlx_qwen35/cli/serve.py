"""`serve`: a server for the programs that people use. Knows flags and what is said at the start; the work is
`serving.serve`'s."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import ranks, watching
from mlx_qwen35.cli.demo import DEMO_HINT
from mlx_qwen35.cli.options import OptionError, add_computing_arguments, add_lookup_argument, kv_options
from mlx_qwen35.cli.progress import Progress
from mlx_qwen35.text.screen import note

if TYPE_CHECKING:
    from mlx_qwen35.serving.server import Server

DESCRIPTION = "Serve models over HTTP with the APIs of OpenAI, Anthropic, LM Studio and Ollama, and a chat page at /."
KEY = "MLX_QWEN35_API_KEY"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    models = parser.add_argument_group("models")
    models.add_argument(
        "--model",
        action="append",
        default=[],
        metavar="NAME",
        help="a folder, an LM Studio key or a Hugging Face name; may be repeated. The first is loaded at once, the "
        "others on demand; a single model answers to every name (default: all models on this machine)",
    )
    models.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory limit of all models together, such as 24GB or 60%%; idle models are unloaded to make room, and "
        "experts that do not fit are streamed from the disk (default: what this machine can give)",
    )
    models.add_argument(
        "--ttl",
        type=float,
        default=3600,
        metavar="S",
        help="unload a model after S idle seconds; 0: never (default: 3600)",
    )
    models.add_argument("--mtp", action="store_true", help="draft with a model's own multi-token prediction head")
    add_lookup_argument(models)
    models.add_argument(
        "--exact", action="store_true", help="the same bits whatever runs beside a request, on a GPU too; slower"
    )
    add_computing_arguments(models)
    ranks.add_rank_arguments(models)
    answers = parser.add_argument_group("answers")
    answers.add_argument(
        "--parallel", type=int, default=4, metavar="N", help="answer N requests per model at once (default: 4)"
    )
    answers.add_argument(
        "--most-waiting", type=int, default=64, metavar="N", help="let N more wait and refuse others (default: 64)"
    )
    answers.add_argument("--cache-dir", metavar="FOLDER", help="keep computed prompts here for the next start")
    answers.add_argument("--fetch", action="store_true", help="fetch pictures from http(s) URLs")
    doors = parser.add_argument_group("access")
    doors.add_argument("--host", default="127.0.0.1", metavar="HOST", help="listen here (default: 127.0.0.1)")
    doors.add_argument("--port", type=int, default=1234, metavar="N", help="listen on this port (default: 1234)")
    doors.add_argument("--api-key", metavar="KEY", help=f"require this key (default: the environment variable {KEY})")
    doors.add_argument("--allow-anyone", action="store_true", help="with --host: let other machines in without a key")
    doors.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let web pages of this origin use the server; may be repeated, *: all",
    )
    doors.add_argument(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="also accept this host name; may be repeated",
    )
    doors.add_argument(
        "--grace",
        type=float,
        default=10.0,
        metavar="S",
        help="at shutdown let answers finish for S seconds (default: 10)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="log more, such as ignored fields")


def run(args: argparse.Namespace) -> int:
    from mlx_qwen35.serving.server import serve

    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("mlx_qwen35.serving").setLevel(logging.DEBUG if args.verbose else logging.INFO)
    if args.kv_bits is None and (args.kv_group_size, args.quantized_kv_start) != (64, 0):
        raise OptionError("--kv-group-size and --quantized-kv-start say how --kv-bits is done: add --kv-bits 4 or 8")
    count = ranks.count_of(args)
    if count > 1:
        if len(args.model) > 1:
            raise OptionError("a model on ranks is the only one: give one --model")
        if not os.environ.get(watching.WATCHED):
            return _watched(args)
        watching.end_with_who_watches()
        if (status := ranks.follows(args, lambda: _folder(args), _chosen(args))) is not None:
            return status
    serve(
        args.model or (["demo"] if count > 1 else None),
        host=args.host,
        port=args.port,
        api_key=args.api_key or os.environ.get(KEY) or None,
        memory=args.memory,
        parallel=args.parallel,
        most_waiting=args.most_waiting,
        ttl=0 if count > 1 else args.ttl,
        cache_dir=args.cache_dir,
        mtp=args.mtp,
        lookup=args.lookup,
        cors=args.cors,
        allowed_hosts=args.allowed_host,
        allow_anyone=args.allow_anyone,
        grace=args.grace,
        context_length=args.context_length,
        dtype=args.dtype,
        exact=args.exact,
        kernels=args.kernels,
        fetch=args.fetch,
        ranks=count if count > 1 else None,
        plan=args.plan,
        **kv_options(args),
        on_ready=_tell,
        on_progress=Progress("Downloading", "bytes"),
    )
    return 0


def _watched(args: argparse.Namespace) -> int:
    """This program again, watched over; where it answers, the port is this process's."""
    from mlx_qwen35.parallel.place import place_of
    from mlx_qwen35.serving.server import bound, check_installed

    check_installed()
    place = place_of()
    door = bound(args.host, args.port) if place is None or place.rank == 0 else None
    return watching.watch(sys.argv[1:], door)


def _folder(args: argparse.Namespace) -> Path:
    from mlx_qwen35.library import find

    return find(args.model[0] if args.model else None, on_progress=Progress("Downloading", "bytes"))


def _chosen(args: argparse.Namespace) -> dict[str, Any]:
    """Of `load`, as rank 0's server has it."""
    from mlx_qwen35.cache.kv import KVFormat

    form = None if args.kv_bits is None else KVFormat(args.kv_bits, args.kv_group_size, args.quantized_kv_start)
    return {"dtype": args.dtype, "context_length": args.context_length, "yarn": args.yarn, "kv_form": form}


def _tell(server: Server) -> None:
    """Where it answers, and to which names."""
    watching.tell_ready()
    names = [place.name for place in server.places]
    if names == ["demo"]:
        note(f"This is the demo, a tiny model inside the package. {DEMO_HINT}")
    every = " (and to every other name)" if server.named and len(names) == 1 else ""
    print(f"{server.url} answers to {', '.join(names) or 'no model: there is none on this machine'}{every}", flush=True)
