"""The memory that reading a long prompt takes: the cache and a constant, whatever the length.

    python benchmarks/long_prompt.py [--lengths 32768 65536 131072] [--kv-bits 8] [--out FILE]

A tiny random model (one layer of each kind, 2 heads of 32, a vocabulary of 96), because what is asked is how memory
grows, and attention over 131,072 tokens takes minutes on a CPU. One process a length. Measured by MLX's own count of
bytes: the peak while prefill() runs, less the cache and what was held before.
Prints a table, and one JSON line a length (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

MIB = 1 << 20
CONFIG = {
    "model_type": "qwen3_5_text", "hidden_size": 64, "intermediate_size": 128, "vocab_size": 96, "eos_token_id": 95,
    "head_dim": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2, "rms_norm_eps": 1e-6,
    "layer_types": ["linear_attention", "full_attention"], "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_value_head_dim": 16, "hidden_act": "silu",
    "max_position_embeddings": 1 << 20, "tie_word_embeddings": True, "attention_bias": False, "attn_output_gate": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.5},
}  # fmt: skip


def measured(length: int, kv_bits: int | None = None) -> dict[str, float]:
    """One prefill of `length` tokens in this process. Bytes, and seconds."""
    import mlx.core as mx

    from mlx_qwen35.cache.kv import KVFormat
    from mlx_qwen35.config import ModelConfig
    from mlx_qwen35.generation import prefill
    from mlx_qwen35.model import Model

    mx.random.seed(0)
    model = Model(ModelConfig.from_dict(CONFIG))
    model.eval()
    model.kv_form = None if kv_bits is None else KVFormat(kv_bits, 32)
    mx.eval(model.parameters())
    tokens, cache = [(7 * n * n + n) % 90 for n in range(length)], model.make_cache()
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()  # weights, and what else this process holds
    begin = time.perf_counter()
    prefill(model, tokens, cache)
    seconds, peak = time.perf_counter() - begin, mx.get_peak_memory()
    return {"peak": peak, "cache": cache.nbytes, "rest": peak - cache.nbytes - before, "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[32_768, 65_536, 131_072])
    parser.add_argument("--kv-bits", type=int)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measured(args.one, args.kv_bits)))
        return
    from mlx_qwen35.layers.attention import MOST_SCORES

    print(f"{'tokens':>9} {'peak MiB':>9} {'cache MiB':>9} {'rest MiB':>9} {'seconds':>8}")
    for length in args.lengths:
        command = [sys.executable, __file__, "--one", str(length)]
        command += ["--kv-bits", str(args.kv_bits)] if args.kv_bits else []
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
        found = json.loads(done.stdout)
        print(f"{length:9,} " + " ".join(f"{found[k] / MIB:9.1f}" for k in ("peak", "cache", "rest")), end="")
        print(f" {found['seconds']:8.1f}", flush=True)
        if args.out:
            with open(args.out, "a") as file:
                file.write(json.dumps({"tokens": length, "kv_bits": args.kv_bits, **found}) + "\n")
    print(f"One tile of scores is {MOST_SCORES * 4 / MIB:.0f} MiB at most.")


if __name__ == "__main__":
    main()
