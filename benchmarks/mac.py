"""How fast Qwen3.5 runs on this Mac with experts from its SSD; and what is to be expected of Macs that are not here.

    python benchmarks/mac.py [--models NAME ...] [--memory 12GB 50% ...] [--tokens 96] [--prompt 2048] [--out FILE]
    python benchmarks/mac.py --modelled

Without --models: every mixture of experts on this machine that fits, or can be streamed; where there is none, a model
with the geometry of the 35B, 8 of its 40 layers and random weights (4.5 GB in a temporary folder). Without --memory:
as the package plans by itself, and where all of it fits, with half of the memory that it takes, so that it streams.
Each line is a process of its own: loading, a prompt, an answer of given length.

    held      experts in memory, of all             hits    of the experts that tokens asked for, how many were there
    tok/s     an answer, one token after the other   wait    part of that time that stood still for the disk
    prompt    tokens of the prompt a second          disk    GB/s of experts at random places, not from the page
                                                     cache: a token's at once, and many at once

--modelled computes the same table for classes of Macs from their makers' bandwidths, this package's memory plan, hit
rates of drawn routing (the most and the least of results/replay.json, through mlx_qwen35/library/speed.py, which
`mlx-qwen35 estimate` uses too) and the constants below. It is a model: nothing in it was run on a Mac.
Knows the package's public calls. Knows nothing of how streaming works.
Prints a table, and one JSON line per row (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]

from benchmarks import measuring  # noqa: E402
from tests.experts.synthetic import LAYERS, synthetic_config, write_synthetic  # noqa: E402

SYNTHETIC_LAYERS = 8
TEXT = "The tide turns twice a day, and whoever lives by it learns to read the water before the clock. "

# What --modelled takes for granted. Everything else in it is computed.
MEMORY_USED = 0.6  # of the stated memory bandwidth, in decoding
DISK_USED = (0.5, 0.85)  # of the stated SSD bandwidth: records one layer at a time, and with many under way


@dataclass(frozen=True)
class Mac:
    """Bandwidths in GB/s: of the memory, as stated; of the SSD, as stated or widely measured for sequential reading."""

    name: str
    memory: int
    bandwidth: float
    ssd: float


MACS = (
    Mac("M4, 16 GB", 16, 120, 2.9), Mac("M5, 32 GB", 32, 153, 6.0), Mac("M4 Pro, 48 GB", 48, 273, 5.0),
    Mac("M5 Pro, 64 GB", 64, 307, 14.5), Mac("M4 Max, 128 GB", 128, 546, 7.0), Mac("M5 Max, 128 GB", 128, 614, 14.5),
    Mac("M3 Ultra, 256 GB", 256, 819, 6.0),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A line of the table. Pairs are least and most; None: not known or none."""

    machine: str
    model: str
    memory: float
    held: float
    hits: tuple[float, float] | None
    decode: tuple[float, float]
    wait: float | None
    prompt: tuple[float, float] | None
    disk: tuple[float, float] | None


def table(rows: list[Row]) -> str:
    heads = ("machine", "model", "memory", "held", "hits", "tok/s", "wait", "prompt tok/s", "disk GB/s")
    cells = [
        (row.machine, row.model, f"{row.memory:.0f} GB", f"{row.held:.0%}", _range(row.hits, "{:.0%}"),
         _range(row.decode, "{:.1f}"), _range(row.wait, "{:.0%}"), _range(row.prompt, "{:.0f}"),
         _range(row.disk, "{:.1f}"))
        for row in rows
    ]  # fmt: skip
    lines = [" | ".join(("", *line, "")).strip() for line in (heads, ("---",) * len(heads), *cells)]
    return "\n".join(lines)


def _range(value: float | tuple[float, float] | None, form: str) -> str:
    if value is None:
        return ""
    low, high = value if isinstance(value, tuple) else (value, value)
    texts = form.format(low), form.format(high)
    return texts[0] if texts[0] == texts[1] else " to ".join(texts)


# Measured.


def measured_row(ref: str, name: str, memory: str | None, arguments: argparse.Namespace) -> Row:
    """One line, by a process of its own."""
    job = {"ref": ref, "memory": memory, "tokens": arguments.tokens, "prompt": arguments.prompt}
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found = json.loads(done.stdout.splitlines()[-1])
    same = {key: None if found[key] is None else (found[key],) * 2 for key in ("hits", "decode", "prompt")}
    same["disk"] = found["disk"] and tuple(found["disk"])
    return Row(measuring.processor_name(), name, found["memory"] / 1e9, found["held"], wait=found["wait"], **same)


def run_here(job: dict[str, Any]) -> dict[str, Any]:
    """Load, read a prompt, answer: what the process of one line does."""
    import mlx.core as mx

    from mlx_qwen35 import estimate, load_model
    from mlx_qwen35.generation import decode, prefill
    from mlx_qwen35.library.finding import find
    from mlx_qwen35.sampling import History, Sampler, Sampling

    folder = find(job["ref"])
    plan = estimate(job["ref"], memory=job["memory"])
    model = load_model(folder, memory=job["memory"])
    tokens = prompt_tokens(folder, job["prompt"])
    sampling = Sampling(temperature=1.0, seed=0)  # a random model would repeat itself, and so ask for few experts
    cache, sampler = model.make_cache(), Sampler(sampling)
    history = History(sampling, [tokens], model.config.text.vocab_size)
    prefill(model, tokens[:8], model.make_cache())  # kernels are compiled
    start = time.perf_counter()
    logits = prefill(model, tokens, cache)
    mx.eval(logits)
    prompt_seconds = time.perf_counter() - start
    steps = decode(model, cache, logits, sampler, history, max_tokens=job["tokens"] + 8)
    for _ in range(8):
        next(steps)
    before, start = model.expert_stats, time.perf_counter()
    for _ in range(job["tokens"]):
        next(steps)
    seconds = time.perf_counter() - start
    stats = None if before is None else model.expert_stats - before
    return {
        "memory": plan.memory,
        "held": plan.streaming.share if stats is not None and plan.streaming else 1.0,
        "hits": stats.hit_rate if stats is not None else None,
        "decode": job["tokens"] / seconds,
        "wait": stats.wait_seconds / seconds if stats is not None else None,
        "prompt": len(tokens) / prompt_seconds,
        "disk": disk_speeds(folder, model.config.text.moe.experts_per_token),
    }


def prompt_tokens(folder: Path, count: int) -> list[int]:
    """So many tokens: of a text, or random ones where the folder has no tokenizer."""
    if not (folder / "tokenizer.json").exists():
        return [random.Random(0).randrange(8192) for _ in range(count)]
    from mlx_qwen35 import load_processor

    tokens = load_processor(folder).encode(TEXT * (count // 8))
    return list(tokens)[:count]


def disk_speeds(folder: Path, per_token: int) -> tuple[float, float] | None:
    """GB/s of experts at random places, as few at once as a token asks for and many; None where they are in a form
    that is not streamed."""
    from mlx_qwen35.checkpoint.expert_files import expert_layouts
    from mlx_qwen35.checkpoint.load import read_config
    from mlx_qwen35.checkpoint.source import open_source
    from mlx_qwen35.errors import CheckpointError
    from mlx_qwen35.library.speed import disk_speed

    try:
        layouts = expert_layouts(open_source(folder, read_config(folder)))
    except CheckpointError:
        return None
    shallow, deep = disk_speed(layouts, per_token)
    return shallow / 1e9, deep / 1e9


def measured(arguments: argparse.Namespace, folder: Path) -> list[Row]:
    from mlx_qwen35 import estimate, list_models

    here = [m for m in list_models() if m.complete and m.place != "the package"]
    names = arguments.models or [m.name for m in here if _has_experts(m.folder)]
    refs = {name: name for name in names}
    if not refs:
        config = synthetic_config("35B", SYNTHETIC_LAYERS)
        print("no Qwen3.5 with experts on this machine: writing one with random weights")
        refs = {f"35B cut to {SYNTHETIC_LAYERS} layers": str(write_synthetic(folder / "35B", config))}
    rows = []
    for name, ref in refs.items():
        plan = estimate(ref)
        if not plan.fits and (plan.streaming is None or plan.streaming.plan is None):
            print(f"{name} is left out: {plan.missing / 1e9:.1f} GB are missing")
            continue
        memories = arguments.memory or ([None, str(plan.needed // 2)] if plan.fits else [None])
        for memory in memories:
            try:
                rows.append(measured_row(ref, name, memory, arguments))
            except RuntimeError as error:
                print(f"{name} with {memory}: {error}", file=sys.stderr)
    return rows


def _has_experts(folder: Path) -> bool:
    config = json.loads((folder / "config.json").read_text())
    return "num_experts" in config.get("text_config", config) and (folder / "tokenizer.json").exists()


# Modelled.


def modelled(folder: Path) -> list[Row]:
    rows = []
    for size in LAYERS:
        (folder / size).mkdir()
        (folder / size / "config.json").write_text(json.dumps(published_config(size)))
        rows += [row for mac in MACS if (row := modelled_row(mac, size, folder / size))]
    return rows


def published_config(size: str) -> dict[str, Any]:
    config = synthetic_config(size, LAYERS[size])
    return {key: value for key, value in config.items() if not key.startswith(("quantization", "vision_config"))}


def modelled_row(mac: Mac, size: str, folder: Path) -> Row | None:
    """None where not even the smallest pool fits."""
    from mlx_qwen35 import estimate
    from mlx_qwen35.library.speed import LAYER_SECONDS, hit_rates

    working_set = int(mac.memory * 1e9 * (2 / 3 if mac.memory <= 36 else 3 / 4))  # what macOS recommends
    plan = estimate(folder, memory=working_set, bits=4, dtype="bfloat16", context_length=8192)
    text = published_config(size)["text_config"]
    layers, per_token = text["num_hidden_layers"], text["num_experts_per_tok"]
    expert = plan.weights.experts / (layers * text["num_experts"])
    active = plan.weights.trunk + plan.weights.embedding / 2 + layers * per_token * expert  # the head, and no embedding
    compute = active / (mac.bandwidth * 1e9 * MEMORY_USED)
    streaming = plan.streaming
    if plan.fits or (streaming and streaming.plan and not streaming.chunk_bytes):
        return Row(mac.name, size, mac.memory, 1.0, None, (1 / compute,) * 2, None, None, None)
    if streaming is None or streaming.plan is None:
        return None
    hits = hit_rates(streaming.share)
    speeds, waits = [], []
    for hit, used in zip(hits, DISK_USED, strict=True):
        reading = (1 - hit) * streaming.token_bytes / (mac.ssd * 1e9 * used)
        seconds = compute + layers * LAYER_SECONDS + reading
        speeds.append(1 / seconds)
        waits.append(reading / seconds)
    sweep = [streaming.plan.chunk / (streaming.chunk_bytes / (mac.ssd * 1e9 * used)) for used in DISK_USED]
    disk = tuple(mac.ssd * used for used in DISK_USED)
    return Row(mac.name, size, mac.memory, streaming.share, hits, tuple(speeds), sum(waits) / 2, tuple(sweep), disk)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", help="names or folders, as list_models() shows them")
    parser.add_argument("--memory", nargs="+", help='ceilings to try, as "12GB" or "50%%"')
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--modelled", action="store_true", help="compute the table for classes of Macs")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        print(json.dumps(run_here(json.loads(arguments.job))))
        return
    around = measuring.circumstances() | {"modelled": arguments.modelled}
    with tempfile.TemporaryDirectory() as folder:
        rows = modelled(Path(folder)) if arguments.modelled else measured(arguments, Path(folder))
    told = "modelled, not measured" if arguments.modelled else f"measured on {around['machine']}"
    print(f"{told}; mlx {around['mlx']}, {around['commit']}\n\n{table(rows)}")
    lines = [json.dumps({"benchmark": "mac"} | asdict(row) | around) for row in rows]
    if arguments.out:
        with arguments.out.open("a") as file:
            print(*lines, sep="\n", file=file)


if __name__ == "__main__":
    main()
