"""`estimate`: what a model takes in memory, and what fits. Knows flags; the work is `library.estimate`'s."""

from __future__ import annotations

import argparse
import json

from mlx_qwen35.cli.options import DTYPES, OptionError, add_kv_arguments, kv_options

DESCRIPTION = "Say what a model takes in memory, how long a context fits and what is streamed, without loading it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", nargs="?", metavar="NAME", help="a folder or a name, as for --model (default: the demo)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="the most that the process may take, such as 24GB or 60%% (default: what this machine has for it)",
    )
    parser.add_argument(
        "--mac", metavar="SIZE", help="on a Mac with so much memory, such as 24GB, of which the system keeps its share"
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens to plan for (default: all that fit)")
    parser.add_argument("--q-bits", type=int, metavar="N", help="as a conversion to N bits would have it")
    parser.add_argument("--dtype", choices=DTYPES, help="compute in it (default: float32 on a CPU, bfloat16 on a GPU)")
    add_kv_arguments(parser)
    parser.add_argument("--mtp", action="store_true", help="with the model's own multi-token-prediction head")
    parser.add_argument("--draft-model", metavar="NAME", help="with a small model that drafts tokens")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="where experts would be read from this disk: read from it for a second, and say how fast answers may come",
    )
    parser.add_argument(
        "--hosts", metavar="SIZES", help="on several Macs with so much memory, such as 64GB,128GB (docs/DISTRIBUTED.md)"
    )
    parser.add_argument(
        "--link", default="tb5", help="that joins them: tb5 (Thunderbolt 5, RDMA), tb5-ring (TCP), 10gbe (default: tb5)"
    )
    parser.add_argument("--plan", help="experts, pipeline or tensor (default: the fastest that fits)")
    parser.add_argument("--json", action="store_true", help="a JSON object; sizes in bytes")


def run(args: argparse.Namespace) -> int:
    from mlx_qwen35.library.estimating import estimate

    try:
        if args.hosts is not None:
            return _on_hosts(args)
        options = {"bits": args.q_bits, "dtype": args.dtype, "probe": args.probe, **kv_options(args)}
        options |= {"mtp": args.mtp, "draft_model": args.draft_model, "mac": args.mac}
        plan = estimate(args.ref, args.memory, args.context_length, **options)
    except OSError as error:
        raise OptionError(f"the files cannot be read ({error}): give --no-probe, or mend them") from error
    except ValueError as error:
        raise error if isinstance(error, OptionError) else OptionError(str(error)) from error
    print(json.dumps(plan.as_dict(), ensure_ascii=False, indent=2) if args.json else plan)
    return 0


def _on_hosts(args: argparse.Namespace) -> int:
    from mlx_qwen35.cache.kv import KVFormat
    from mlx_qwen35.library.hosts import estimate_hosts

    if args.memory is not None or args.mac is not None:
        raise OptionError("--hosts says how much memory there is: leave --memory and --mac out")
    form = None if args.kv_bits is None else KVFormat(args.kv_bits, args.kv_group_size, args.quantized_kv_start)
    how = {"bits": args.q_bits, "context_length": args.context_length, "dtype": args.dtype, "kv_form": form}
    plan = estimate_hosts(args.ref, args.hosts, args.link, plan=args.plan, **how)
    print(json.dumps(plan.as_dict(), ensure_ascii=False, indent=2) if args.json else plan)
    return 0
