"""Whether a process stays under the ceiling that it was given, with a checkpoint that is several times larger.

    python benchmarks/ceiling.py [--size 35B] [--layers 8] [--times 4] [--prompt 2000] [--tokens 64] [--folder DIR]

Writes a synthetic 4-bit checkpoint of the real geometry of `size` (fewer layers; the vocabulary is small, the rest is
not) and starts a process that loads it with memory= a `times`-th of what its files have, reads a prompt and decodes.
The kernel's high-water mark of that process (VmHWM) is read from outside while it still lives: all of its pages, Python
and libraries with them. Linux only. Knows the public calls of the package and nothing of how it keeps its word.
Prints one JSON line (or appends it to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(CHECKOUT))

from benchmarks.measuring import circumstances, write  # noqa: E402
from mlx_qwen35.machine.system import peak_of_process  # noqa: E402
from tests.experts.synthetic import all_expert_bytes, synthetic_config, write_synthetic  # noqa: E402

VOCABULARY = 16384
_CHILD = """
import json, sys, time
import mlx.core as mx
from mlx_qwen35 import load_model
from mlx_qwen35.generation import prefill
job = json.loads(sys.argv[1])
mx.set_default_device(mx.cpu)
model = load_model(job["folder"], memory=job["memory"], context_length=job["context"])
cache = model.make_cache()
tokens = [(7 * n * n + n) % job["vocabulary"] for n in range(job["prompt"])]
start = time.perf_counter()
logits = prefill(model, tokens, cache)
read = time.perf_counter() - start
start = time.perf_counter()
for _ in range(job["tokens"]):
    logits = model(mx.argmax(logits.reshape(1, -1, logits.shape[-1])[:, -1:], axis=-1), cache)
    mx.eval(logits)
decoded = time.perf_counter() - start
stats, plan = model.expert_stats, model._pool.plan
print(json.dumps({
    "prefill_seconds": read, "decode_seconds": decoded, "slots": plan.slots, "chunk": plan.chunk, "tile": plan.tile,
    "group": plan.group, "records": stats.records, "bytes_read": stats.bytes_read, "hit_rate": stats.hit_rate,
    "arrays_peak": mx.get_peak_memory(),
}), flush=True)
sys.stdin.readline()
"""


def run(folder: Path, memory: int, *, prompt: int, tokens: int, context: int, vocabulary: int) -> dict[str, Any]:
    """What a process of its own reports that reads a prompt and decodes; "peak": its high-water mark, in bytes."""
    job = {"folder": str(folder), "memory": memory, "prompt": prompt, "tokens": tokens, "context": context,
           "vocabulary": vocabulary}  # fmt: skip
    command = [sys.executable, "-c", _CHILD, json.dumps(job)]
    with subprocess.Popen(command, cwd=CHECKOUT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        said = child.stdout.readline()
        peak = peak_of_process(child.pid) if said else 0
        child.communicate("\n")
    if child.returncode:
        raise RuntimeError(f"the process of {job} left with {child.returncode}")
    if peak is None:
        raise RuntimeError(f"the system says nothing of the memory of process {child.pid}")
    return json.loads(said) | {"peak": peak}


def size_of(folder: Path) -> int:
    """Bytes of the weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def measure(folder: Path, config: Mapping[str, Any], times: float, prompt: int, tokens: int) -> dict[str, Any]:
    """A record: of the checkpoint in `folder` under a `times`-th of its size."""
    memory = int(size_of(folder) / times)
    vocabulary = config["text_config"]["vocab_size"]
    given = {"prompt": prompt, "tokens": tokens, "context": max(prompt + tokens, 256), "vocabulary": vocabulary}
    found = run(folder, memory, **given)
    return {
        "checkpoint": size_of(folder), "experts": all_expert_bytes(config), "memory": memory, **given, **found,
        "share": found["peak"] / memory,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", default="35B", choices=["35B", "122B", "397B"])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--times", type=float, default=4, help="by how much the checkpoint is larger than the ceiling")
    parser.add_argument("--prompt", type=int, default=2000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--folder", type=Path, help="where to write it (default: a temporary folder)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    around, config = circumstances(), synthetic_config(args.size, args.layers, vocab_size=VOCABULARY)
    with tempfile.TemporaryDirectory(dir=args.folder) as made:
        folder = write_synthetic(Path(made) / "model", config)
        record = measure(folder, config, args.times, args.prompt, args.tokens)
    about = {"benchmark": "ceiling", "size": args.size, "layers": args.layers}
    write([about | record], around, args.out)
    print(f"{record['peak'] / 1e9:.3f} GB of {record['memory'] / 1e9:.3f} GB", file=sys.stderr)
    return os.EX_OK if record["peak"] <= record["memory"] else 1


if __name__ == "__main__":
    sys.exit(main())
