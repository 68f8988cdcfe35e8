"""How long until something happens: importing the package, and the first token counted from process start.

    python benchmarks/startup.py [--model FOLDER] [--repeats 9] [--out FILE]

This package and mlx-lm take turns in one run, each measurement in a process of its own, after a warm-up round that is
not counted. Knows the public calls of both. Knows nothing of what the models answer.
Prints a table, then one JSON line per measured quantity (also appended to FILE), as METHODOLOGY.md describes.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks.measuring import circumstances, compared, in_turns, installed, spread, write  # noqa: E402

PROMPT = "What is 17 + 25?"

# Each child prints one figure: seconds spent in the statement, or the clock at the first token.
IMPORT = "import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
OURS = """
import sys, time
from mlx_qwen35 import Sampling, load, stream_generate
model, processor = load(sys.argv[1])
for part in stream_generate(model, processor, sys.argv[2], max_tokens=2, sampling=Sampling(temperature=0.0)):
    print(time.time())
    break
"""
THEIRS = """
import sys, time
import mlx.core as mx
from mlx_lm import load, stream_generate
model, tokenizer = load(sys.argv[1])
if mx.default_device() == mx.cpu:  # 16-bit expert products do not exist there: float32, as this package does by itself
    model.set_dtype(mx.float32)
prompt = tokenizer.apply_chat_template([{"role": "user", "content": sys.argv[2]}], add_generation_prompt=True)
for part in stream_generate(model, tokenizer, prompt, max_tokens=2):
    print(time.time())
    break
"""
STATEMENTS = {
    "import": ("import mlx_qwen35", "import mlx_lm"),
    "import of load and generate": ("from mlx_qwen35 import load, generate", "from mlx_lm import load, generate"),
}


def run_child(code: str, *arguments: str) -> float:
    # Installed packages have their byte code beside them; a checkout gets it in the warm-up round, unless forbidden.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"a measured process failed:\n{done.stderr}")
    return float(done.stdout.split()[-1])


def import_seconds(statement: str) -> float:
    return run_child(IMPORT.format(statement=statement))


def first_token_seconds(code: str, folder: Path) -> float:
    """Wall clock from before the process is started to the moment its first token is in hand."""
    start = time.time()
    return run_child(code, str(folder), PROMPT) - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint folder (the demo inside the package)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    arguments = parser.parse_args()
    if installed("mlx-lm") is None:
        raise SystemExit("mlx-lm is not installed; pip install mlx-lm")
    folder = arguments.model or CHECKOUT / "mlx_qwen35/demo"
    around = circumstances()
    pairs = {
        name: (lambda s=ours: import_seconds(s), lambda s=theirs: import_seconds(s))
        for name, (ours, theirs) in STATEMENTS.items()
    }
    pairs["first token from process start"] = (
        lambda: first_token_seconds(OURS, folder),
        lambda: first_token_seconds(THEIRS, folder),
    )
    rounds = {name: in_turns(sides, arguments.repeats) for name, sides in pairs.items()}

    print(f"{arguments.repeats} rounds, warm; seconds: median [least .. most]")
    print(f"{'':32s}{'mlx_qwen35':>24s}{'mlx-lm':>24s}   theirs / ours")
    records = [compared("startup", name, "s", pairs_of_name) for name, pairs_of_name in rounds.items()]
    for record in records:
        cells = f"{spread(record['ours']):>24s}{spread(record['theirs']):>24s}   {spread(record['ratio'], '.1f')}"
        print(f"{record['quantity']:32s}{cells}")
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
