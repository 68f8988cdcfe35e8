"""What rotations before 2-bit products cost on this CPU: a model with them and the same without, in turns.

    python benchmarks/rotation.py [--size 0.8B] [--layers 8] [--tokens 256] [--rounds 5]

Knows the models of launches.py (--side 2-bit rotated counts the same for Metal). Weights are random: what is said means
nothing. Times are of the processor, of this process alone, so that other work on the machine counts for little.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import geometry  # noqa: E402
from benchmarks.launches import TWO_BITS, rotate, share_signs  # noqa: E402
from benchmarks.measuring import circumstances, write  # noqa: E402
from mlx_qwen35.config import ModelConfig  # noqa: E402
from mlx_qwen35.generation import prefill  # noqa: E402
from mlx_qwen35.model import Model  # noqa: E402

STEPS = 16


def built(config: dict[str, Any], *, rotated: bool) -> Model:
    """With small random weights, packed."""
    mx.random.seed(0)
    model = Model(ModelConfig.from_dict(config))

    def packed(path: str, module: nn.Module) -> bool | dict[str, int]:
        plain = not hasattr(module, "to_quantized") or path.endswith(("in_proj_a", "in_proj_b"))
        return False if plain else dict(TWO_BITS)

    nn.quantize(model, class_predicate=packed)
    if rotated:
        rotate(model)
        share_signs(model)
    model.join()
    model.eval()
    mx.eval(model.parameters())
    return model


def once(model: Model, tokens: int) -> dict[str, float]:
    """Seconds of the processor: of a prompt, and of a token after it."""
    cache = model.make_cache()
    begin = time.process_time()
    mx.eval(prefill(model, [1 + n % 500 for n in range(tokens)], cache))
    read = time.process_time()
    for _ in range(STEPS):
        mx.eval(model(mx.array([[7]]), cache))
    return {"prompt": read - begin, "token": (time.process_time() - read) / STEPS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=geometry.SIZES, default="0.8B")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    config = geometry.config(arguments.size, arguments.layers, vocab_size=32768)
    sides = {"2-bit": built(config, rotated=False), "rotated": built(config, rotated=True)}
    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for number in range(arguments.rounds + 1):
        for side, model in sides.items():
            took = once(model, arguments.tokens)
            if number:  # the first is to warm up
                found[side].append(took)
    records = []
    for what in ("prompt", "token"):
        ratios = [b[what] / a[what] for a, b in zip(found["2-bit"], found["rotated"], strict=True)]
        plain, turned = (statistics.median(took[what] for took in found[side]) for side in sides)
        shown = f"{statistics.median(ratios):.3f} [{min(ratios):.3f} .. {max(ratios):.3f}]"
        print(f"{what:7s} 2-bit {1e3 * plain:9.2f} ms, rotated {1e3 * turned:9.2f} ms, ratio {shown}")
        records.append({"benchmark": "rotation", "what": what, "size": arguments.size, "ratios": ratios})
    write(records, circumstances(), arguments.out)


if __name__ == "__main__":
    main()
