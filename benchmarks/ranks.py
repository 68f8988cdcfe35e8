"""One model on several ranks of this machine, over loopback, beside mlx-lm's sharding of the same checkpoint.

`python benchmarks/ranks.py [--ranks 2] [--rounds 2]`. Every side is processes of its own, in turns. What is counted
(messages, bytes, memory) does not depend on the machine; what is timed says what processes on these cores do, and
nothing about two Macs: docs/DISTRIBUTED.md has the model for those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks.measuring import circumstances, in_turns, spread, summary, write  # noqa: E402
from mlx_qwen35.parallel.place import on_this_machine  # noqa: E402
from tests.experts.synthetic import synthetic_config, write_synthetic  # noqa: E402

PROMPT, STEPS = 64, 48
SIDES = ("ours", "theirs")


def tokens(config: dict[str, Any], count: int, seed: int = 0) -> list[int]:
    return np.random.RandomState(seed).randint(0, config["text_config"]["vocab_size"], count).tolist()


def ours(folder: Path, ranks: int, plan: str, steps: int, memory: str) -> dict[str, Any]:
    """Rank 0 of this package; the others are started by it."""
    from mlx_qwen35.library.portions import options_of
    from mlx_qwen35.library.ranked import load_leader

    options = options_of(
        dtype="float32", context_length=2048, yarn=False, kv_form=None, exact=False, kernels=True, plan=plan
    )
    model = load_leader(folder, ranks, options, memory=memory, warm_start=False)
    traffic, cache = model.group.traffic, model.make_cache()
    prompt = tokens(model.config.raw, PROMPT)
    logits = model(mx.array([prompt]), cache)
    said, marks = [mx.argmax(logits[0, -1]).item()], []
    before = traffic.messages, traffic.nbytes
    few = {"best": (1, model.config.text.vocab_size)} if model.cuts_head else {}
    for _ in range(steps):
        start = time.perf_counter()
        hidden = model.hidden(mx.array([[said[-1]]]), cache, **few)
        said.append((model.best[1] if few else mx.argmax(model.head(hidden)[0, -1])).item())
        marks.append(time.perf_counter() - start)
    others = model.ranks.ask(statistics=True)
    made = {
        "tokens": said,
        "seconds": marks,
        "messages": (traffic.messages - before[0]) / steps,
        "bytes": (traffic.nbytes - before[1]) / steps,
        "memory": [mx.get_active_memory(), *(each["memory"] for each in others)],
    }
    model.unload()
    return made


def alone(folder: Path, memory: str, steps: int) -> dict[str, Any]:
    """This package in one process."""
    from mlx_qwen35.library import load_model

    model = load_model(folder, dtype="float32", memory=memory, context_length=2048, warm_start=False)
    cache = model.make_cache()
    logits = model(mx.array([tokens(model.config.raw, PROMPT)]), cache)
    said = [mx.argmax(logits[0, -1]).item()]
    for _ in range(steps):
        logits = model(mx.array([[said[-1]]]), cache)
        said.append(mx.argmax(logits[0, -1]).item())
    made = {"tokens": said, "memory": mx.get_active_memory()}
    model.unload()
    return made


def theirs(folder: Path, steps: int) -> dict[str, Any]:
    """A rank of mlx-lm: its own `shard`, its own generation loop."""
    from mlx_lm.generate import generate_step
    from mlx_lm.utils import load_model

    counted = {"messages": 0, "bytes": 0}
    for name in ("all_sum", "all_gather", "send", "recv"):
        real = getattr(mx.distributed, name)

        def counting(x: Any, *given: Any, real: Any = real, **more: Any) -> Any:
            counted["messages"] += 1
            counted["bytes"] += x.nbytes if isinstance(x, mx.array) else 0
            return real(x, *given, **more)

        setattr(mx.distributed, name, counting)
    group = mx.distributed.init(strict=True, backend="ring")
    model, config = load_model(folder, lazy=True)
    model.shard(group)
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    memory = mx.get_active_memory()
    said, marks, before = [], [], None
    last = time.perf_counter()
    for token, _ in generate_step(mx.array(tokens(config, PROMPT)), model, max_tokens=steps + 1):
        said.append(int(token))
        now = time.perf_counter()
        if len(said) > 1:
            marks.append(now - last)
        if before is None:
            before = dict(counted)
        last = now
    # (their loop asks for one step ahead)
    made = {name: (counted[name] - before[name]) / steps for name in counted}
    return {"tokens": said, "seconds": marks, "memory": [memory], **made}


def run(side: str, folder: Path, ranks: int = 2, steps: int = STEPS, plan: str = "experts", memory: str = "8GB") -> Any:
    """A side in processes of its own; what its rank 0 saw."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--ranks", str(ranks),
               "--steps", str(steps), "--plan", plan, "--memory", memory]  # fmt: skip
    if side != "theirs":
        done = subprocess.run(command, cwd=CHECKOUT, stdout=subprocess.PIPE, text=True, timeout=900)
        return json.loads(done.stdout.splitlines()[-1])
    with tempfile.TemporaryDirectory() as made:
        environments = on_this_machine(ranks, Path(made))
        processes = [
            subprocess.Popen(command, cwd=CHECKOUT, env={**os.environ, **each}, stdout=subprocess.PIPE, text=True)
            for each in environments
        ]
        out = [process.communicate(timeout=900)[0] for process in processes]
    seen = [json.loads(text.splitlines()[-1]) for text in out]
    assert all(each["tokens"] == seen[0]["tokens"] for each in seen)
    return seen[0] | {"memory": [each["memory"][0] for each in seen]}


def expected(folder: Path, whole: int, ranks: int) -> list[float]:
    """Bytes of a model on each rank: an equal part of its experts, the head on rank 0, the shared experts on the last,
    and all else on each. whole: of the model in one process."""
    text = json.loads((folder / "config.json").read_text())["text_config"]
    values = 3 * text["hidden_size"] * text["moe_intermediate_size"]  # 4 bits, a scale and a bias of 4 bytes for 64
    expert, head = (count // 2 + count // 64 * 8 for count in (values, text["hidden_size"] * text["vocab_size"]))
    layers = text["num_hidden_layers"]
    sizes = [whole - layers * expert * text["num_experts"] * (ranks - 1) / ranks] * ranks
    return [size - (rank > 0) * head - (rank < ranks - 1) * layers * expert for rank, size in enumerate(sizes)]


def compare(folder: Path, ranks: int, rounds: int, steps: int, plan: str = "experts") -> dict[str, Any]:
    """Tokens a second, messages, bytes and memory, of both in turns."""
    sides = [lambda side=side: run(side, folder, ranks, steps, plan) for side in SIDES]
    rows = in_turns(sides, rounds, warm=0)
    one = run("alone", folder, 1, steps)
    found: dict[str, Any] = {"same tokens": [sum(a == b for a, b in zip(x["tokens"], one["tokens"], strict=True))
                                             for x in rows[0]], "of": len(one["tokens"])}  # fmt: skip
    for at, name in enumerate(("ours", "mlx-lm")):
        seconds = [np.median(row[at]["seconds"][4:]) for row in rows]
        found[name] = {
            "tokens a second": summary(1 / each for each in seconds),
            "messages a token": rows[0][at]["messages"],
            "bytes a token": rows[0][at]["bytes"],
            "memory": rows[0][at]["memory"],
        }
    ratios = [np.median(b["seconds"][4:]) / np.median(a["seconds"][4:]) for a, b in rows]
    found["ratio"] = summary(ratios)
    found["messages ratio"] = found["ours"]["messages a token"] / found["mlx-lm"]["messages a token"]
    found["alone memory"] = one["memory"]
    planned = expected(folder, one["memory"], ranks) if plan == "experts" else []
    found["memory as expected"] = [a / b for a, b in zip(found["ours"]["memory"], planned, strict=False)]
    print(f"tokens a second: ours {spread(found['ours']['tokens a second'])}, mlx-lm "
          f"{spread(found['mlx-lm']['tokens a second'])}; ratio {spread(found['ratio'])}")  # fmt: skip
    for name in ("messages", "bytes"):
        here, there = (found[side][f"{name} a token"] for side in ("ours", "mlx-lm"))
        print(f"{name} a token: {here:,.1f} beside {there:,.1f}")
    print(f"memory a rank: {found['ours']['memory']} beside {found['mlx-lm']['memory']}; one process {one['memory']}")
    if planned:
        print(f"memory beside that of an equal share: {[round(each, 4) for each in found['memory as expected']]}")
    print(f"tokens as in one process: {found['same tokens']} of {found['of']}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=(*SIDES, "alone"))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--plan", default="experts")
    parser.add_argument("--memory", default="8GB")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mx.set_default_device(mx.cpu)
    if args.side is not None:
        sides = {
            "ours": lambda: ours(args.folder, args.ranks, args.plan, args.steps, args.memory),
            "theirs": lambda: theirs(args.folder, args.steps),
            "alone": lambda: alone(args.folder, args.memory, args.steps),
        }
        print(json.dumps(sides[args.side]()))
        return
    with tempfile.TemporaryDirectory() as made:
        folder = args.folder or Path(made) / "35B"
        if not (folder / "config.json").exists():
            config = synthetic_config("35B", args.layers, num_experts=args.experts, vocab_size=32768)
            write_synthetic(folder, config)
        found = compare(folder, args.ranks, args.rounds, args.steps, args.plan)
        write([found], {"benchmark": "ranks", **circumstances()}, args.out)


if __name__ == "__main__":
    main()
