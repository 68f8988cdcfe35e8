"""`estimate`: what a model takes in memory, and what fits. Knows flags; the work is `library.estimate`'s."""

from __future__ import annotations

import argparse
import json

from mlx_qwen35.cli.options import DTYPES, OptionError, add_kv_arguments, kv_options

DESCRIPTION = "Estimate a model's memory, the context that fits and what is streamed, without loading it."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ref", nargs="?", metavar="NAME", help="a folder or a name, as for --model (default: the demo)")
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        help="memory limit of the process, such as 24GB or 60%% (default: what this machine can give)",
    )
    parser.add_argument(
        "--mac",
        metavar="SIZE",
        help="plan for a Mac with this much memory, such as 24GB, part of which the system keeps",
    )
    parser.add_argument("--context-length", type=int, metavar="N", help="tokens to plan for (default: all that fit)")
    parser.add_argument("--q-bits", type=int, metavar="N", help="plan for a conversion to N bits")
    parser.add_argument("--dtype", choices=DTYPES, help="compute dtype (default: float32 on a CPU, bfloat16 on a GPU)")
    add_kv_arguments(parser)
    parser.add_argument("--mtp", action="store_true", help="include the model's own multi-token prediction head")
    parser.add_argument("--draft-model", metavar="NAME", help="include this draft model")
    parser.add_argument(
        "--probe",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="if experts would be streamed: measure the disk for a second, and estimate the speed",
    )
    parser.add_argument(
        "--hosts",
        metavar="SIZES",
        help="plan for several Macs with these sizes, such as 64GB,128GB (docs/DISTRIBUTED.md)",
    )
    parser.add_argument(
        "--link", default="tb5", help="their network: tb5 (Thunderbolt 5, RDMA), tb5-ring (TCP), 10gbe (default: tb5)"
    )
    parser.add_argument("--plan", help="experts, pipeline or tensor (default: the fastest that fits)")
    parser.add_argument("--json", action="store_true", help="print a JSON object; sizes in bytes")


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
