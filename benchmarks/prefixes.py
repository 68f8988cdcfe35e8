"""Eight requests that begin alike: how many tokens of prompts are computed, here and with the peers' prompt caches.

    python benchmarks/prefixes.py [--prefix 1500] [--requests 8] [--rounds 1] [--out FILE]

The requests have one long system message and a user message each, on the demo checkpoint; answers are greedy and short.
Each side is a process of its own. Counted: tokens that the model was run on before the first token of each answer; and
the seconds until all have ended.

    together      all are there at once: ours through the Engine; mlx-lm through its BatchGenerator, each with the cache
                  that LRUPromptCache had for it when it came, as its server does
    in turn       each after the one before has ended: ours through the Engine; mlx-lm as its server fills
                  LRUPromptCache (after the system message, before the answer, after it); mlx-vlm with
                  stream_generate(apc_manager=)
    next process  ours with cache_dir=, after another process had the same requests with other user messages. Neither
                  peer's cache is on the disk by itself

"least" is the system message once and what each request has after it. Prints a table, and one JSON line a side (or
appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks.measuring import circumstances  # noqa: E402

MOST = 8  # tokens of an answer
WORDS = ("queen", "jacket", "violin", "stone", "kite", "owl", "lamp", "river")

Prompts = list[dict[str, Any]]  # tokens, text, segments: where the system message and the prompt proper end


def prompts(prefix: int, count: int, first: int) -> Prompts:
    """Requests whose first `prefix` tokens or more are the same; `first`: the number in the first one's message."""
    from mlx_qwen35.library import load_processor

    processor = load_processor(None)
    system, made = "Rules.", []
    while len(processor.prompt("x", system=system).tokens) < prefix:
        system += f" Rule {len(system)}: say {WORDS[len(system) % len(WORDS)]}."
    for number in range(count):
        prompt = processor.prompt(f"What is {first + number} + 25?", system=system, enable_thinking=False)
        segments = [prompt.turns[1], prompt.turns[-1]]
        made.append({"tokens": prompt.tokens, "text": prompt.text, "segments": segments})
    return made


def ours(asked: Prompts, together: bool, folder: str | None = None) -> int:
    from mlx_qwen35 import Engine, Sampling, load

    model, processor = load()
    given = {"max_tokens": MOST, "sampling": Sampling()}
    with Engine(model, processor, most_rows=len(asked), cache_dir=folder) as engine:
        if together:
            for answer in [engine.submit(each["tokens"], **given) for each in asked]:
                answer.result()
        else:
            for each in asked:
                engine.submit(each["tokens"], **given).result()
        return engine.computed_tokens


def _lm() -> Any:
    import mlx.core as mx
    from mlx_lm import load

    from mlx_qwen35.library import demo_folder

    model, _ = load(str(demo_folder()))
    model.set_dtype(mx.float32)
    return model


def mlx_lm_together(asked: Prompts) -> int:
    from mlx_lm.generate import BatchGenerator
    from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

    model, kept, computed, caches, rests = _lm(), LRUPromptCache(), 0, [], []
    for each in asked:  # they come before any of them has been computed
        cache, rest = kept.fetch_nearest_cache("demo", each["tokens"])
        caches.append(make_prompt_cache(model) if cache is None else cache)
        rests.append(rest)
        computed += len(rest)
    generator = BatchGenerator(model, max_tokens=MOST)
    left = set(generator.insert(rests, [MOST] * len(asked), caches=caches))
    while left:
        _, generated = generator.next()
        left -= {response.uid for response in generated if response.finish_reason}
    return computed


def mlx_lm_in_turn(asked: Prompts) -> int:
    import copy

    import mlx.core as mx
    from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

    model, kept, computed = _lm(), LRUPromptCache(), 0
    for each in asked:
        tokens = each["tokens"]
        cache, rest = kept.fetch_nearest_cache("demo", tokens)
        cache = make_prompt_cache(model) if cache is None else cache
        at = len(tokens) - len(rest)
        computed += len(rest)
        for end in [*(place for place in each["segments"] if place > at), len(tokens)]:
            logits = model(mx.array([tokens[at:end]]), cache=cache)
            mx.eval(logits, [c.state for c in cache])
            at = end
            if end < len(tokens):
                kind = "system" if end == each["segments"][0] else "user"
                kept.insert_cache("demo", tokens[:end], copy.deepcopy(cache), cache_type=kind)
        said = []
        for _ in range(MOST):
            said.append(logits[0, -1].argmax().item())
            logits = model(mx.array([said[-1:]]), cache=cache)
            mx.eval(logits)
        kept.insert_cache("demo", tokens + said, cache)
    return computed


def mlx_vlm_in_turn(asked: Prompts) -> int:
    import mlx.core as mx
    from mlx_vlm import load, stream_generate
    from mlx_vlm.apc import APCManager

    from mlx_qwen35.library import demo_folder

    model, processor = load(str(demo_folder()))
    model.set_dtype(mx.float32)
    manager, computed = APCManager(), 0
    for each in asked:
        given = {"apc_manager": manager, "max_tokens": MOST, "temperature": 0.0}
        for part in stream_generate(model, processor, each["text"], **given):  # noqa: B007
            pass
        computed += part.prompt_tokens - part.cached_tokens
    return computed


SIDES: dict[str, Callable[[Prompts, str], int]] = {
    "ours, together": lambda asked, folder: ours(asked, True),
    "mlx-lm, together": lambda asked, folder: mlx_lm_together(asked),
    "ours, in turn": lambda asked, folder: ours(asked, False),
    "mlx-lm, in turn": lambda asked, folder: mlx_lm_in_turn(asked),
    "mlx-vlm, in turn": lambda asked, folder: mlx_vlm_in_turn(asked),
    "ours, next process": lambda asked, folder: ours(asked, True, folder),
}


def run(side: str, folder: Path) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prefix", type=int, default=1500)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        asked = json.loads((args.folder / "prompts.json").read_text())
        begin = time.perf_counter()
        computed = SIDES[args.side](asked, str(args.folder / "kept"))
        print(json.dumps({"side": args.side, "computed": computed, "seconds": time.perf_counter() - begin}))
        return
    around = circumstances()
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            before = prompts(args.prefix, args.requests, 50)
            (folder / "prompts.json").write_text(json.dumps(before))
            run("ours, next process", folder)
            asked = prompts(args.prefix, args.requests, 10)
            (folder / "prompts.json").write_text(json.dumps(asked))
            for side in SIDES:
                found[side].append(run(side, folder))
    total, prefix = sum(len(each["tokens"]) for each in asked), asked[0]["segments"][0]
    least = prefix + total - prefix * len(asked)
    print(f"{len(asked)} prompts of {total:,} tokens together, {prefix:,} of each the system message; least {least:,}")
    print(f"{around['machine']}, {around['commit']}")
    print(f"{'':20} {'computed':>9} {'over least':>11} {'seconds, with loading':>22}")
    for side, runs in found.items():
        seconds = statistics.median(one["seconds"] for one in runs)
        bound = total - prefix * len(asked) if side == "ours, next process" else least
        computed = runs[0]["computed"]
        print(f"{side:20} {computed:9,} {computed / bound:11.2f} {seconds:22.2f}")
        if args.out:
            record = {"benchmark": "prefixes", "side": side, "computed": computed, "least": bound, "prompts": total}
            with open(args.out, "a") as file:
                file.write(json.dumps(record | {"seconds": [one["seconds"] for one in runs]} | around) + "\n")


if __name__ == "__main__":
    main()
