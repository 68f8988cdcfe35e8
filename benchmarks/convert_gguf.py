"""How quickly, and in how much memory, a GGUF of Q4_K_M becomes 4 bits of MLX: by the weight, beside a bfloat16 source.

    python benchmarks/convert_gguf.py [--layers 9] [--experts 256] [--vocabulary 248320] [--rounds 3]
                                      [--recipes default uniform] [--source FILE | --only-write FILE]
                                      [--folder DIR] [--out FILE]

Both sources have the geometry of Qwen3.5-35B-A3B with fewer layers: the GGUF so many (9 make 5 GB), the other one as
many as have about its bytes. Blocks are random, each type where llama-quantize puts it in Q4_K_M, the file is
gguf-py's; a tensor at a time is in memory. Conversions are processes of their own and take turns (convert.py says what
is counted). Needs gguf-py.
Knows llama.cpp's types and their bytes. Knows nothing of how this package reads them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]

from benchmarks import measuring  # noqa: E402
from benchmarks.convert import GB, OURS, SIZES, run_once, write_source  # noqa: E402
from tests.checkpoint.gguf.building import gguf_names, keys_of, vocabulary_of  # noqa: E402
from tests.checkpoints import tensor_shapes, tiny_config  # noqa: E402
from tests.text.folders import tokenizer_json  # noqa: E402

_TILE = 1 << 24  # bytes of random blocks, the same again and again
_FLOATS = ("_norm.weight", "ssm_a", "ssm_dt.bias", "ssm_conv1d.weight", "ffn_gate_inp.weight",
           "ffn_gate_inp_shexp.weight")  # fmt: skip


def kind_of(name: str, layers: int) -> str:
    """The type that llama-quantize gives a tensor in Q4_K_M; more bits for v and down in an eighth of the layers at
    either end and in every third between."""
    if name.endswith(_FLOATS):
        return "F32"
    if name == "output.weight":
        return "Q6_K"
    if name == "token_embd.weight":
        return "Q4_K"
    layer, part = int(name.split(".")[1]), name.split(".")[2]
    eighth = layers // 8
    more = layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
    return "Q6_K" if part == "attn_v" or more and part.startswith(("ffn_down", "attn_qkv")) else "Q4_K"


def random_rows(kind: str, count: int, draw: np.random.Generator) -> np.ndarray:
    """[blocks, bytes] of about `count` bytes, whose values are of about the size of weights."""
    nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]][1]
    blocks = draw.integers(0, 256, (max(1, count // nbytes), nbytes), np.uint8)
    # Q4_K: d and dmin times 6 bits times 4; Q6_K: d times 8 bits times 6.
    places, size = ((0, 2), 1e-4) if kind == "Q4_K" else ((208,), 2e-5)
    for at in places:
        scales = draw.uniform(0.5, 1, len(blocks)) * size
        blocks[:, at : at + 2] = scales.astype(np.float16)[:, None].view(np.uint8)
    return blocks


def write_gguf(path: Path, layers: int, **sizes: int) -> None:
    """A model of that many layers, in a process of its own: the kernel counts what a parent held among the memory of
    its children."""
    child = os.fork()
    if not child:
        _write_gguf(path, layers, sizes)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{path} could not be written")


def _write_gguf(path: Path, layers: int, sizes: dict[str, int]) -> None:
    kinds = [("linear_attention", "full_attention")[number % 2] for number in range(layers)]
    config = tiny_config("moe", layer_types=kinds, **SIZES | sizes)
    text = config["text_config"]
    writer = GGUFWriter(path, "qwen35moe")
    keys_of(writer, "qwen35moe", text)
    vocabulary_of(writer, tokenizer_json(), text["vocab_size"])
    zero, draw = np.zeros((), np.float32), np.random.default_rng(0)
    tiles = {kind: random_rows(kind, _TILE, draw) for kind in ("Q4_K", "Q6_K")}
    small: list[tuple[str, np.ndarray | int]] = []
    for name, shape in tensor_shapes(config).items():
        for theirs, (_, value) in gguf_names(config, {name: np.broadcast_to(zero, shape)}).items():
            kind = kind_of(theirs, layers)
            if kind == "F32":
                values = np.ascontiguousarray(value) - np.float32(theirs.endswith("ssm_a"))
                writer.add_tensor_info(theirs, value.shape, np.dtype(np.float32), value.nbytes)
                small.append((kind, values))
                continue
            per, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            rows = (*value.shape[:-1], value.shape[-1] // per * nbytes)
            size = math.prod(rows)
            writer.add_tensor_info(theirs, rows, np.dtype(np.uint8), size, raw_dtype=GGMLQuantizationType[kind])
            small.append((kind, size))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for kind, data in small:
        if isinstance(data, int):
            data = np.resize(tiles[kind].reshape(-1), data)
        writer.write_tensor_data(data)
    writer.close()


def weights_of(layers: int, vision: bool, sizes: dict[str, int]) -> int:
    kinds = [("linear_attention", "full_attention")[number % 2] for number in range(layers)]
    config = tiny_config("moe", vision=vision, layer_types=kinds, **SIZES | sizes)
    return sum(math.prod(shape) for shape in tensor_shapes(config).values())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=9, help="of the GGUF")
    parser.add_argument("--experts", type=int, default=SIZES["num_experts"])
    parser.add_argument("--vocabulary", type=int, default=SIZES["vocab_size"])
    parser.add_argument("--plain-layers", type=int, default=2, help="of the bfloat16 source")
    parser.add_argument("--recipes", nargs="+", choices=["default", "uniform"], default=["default", "uniform"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="work here (default: a temporary folder)")
    parser.add_argument("--source", type=Path, help="a GGUF that --only-write wrote, instead of writing one")
    parser.add_argument("--only-write", type=Path, metavar="FILE", help="write the GGUF there, and nothing else")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    arguments = parser.parse_args()
    sizes = {"num_experts": arguments.experts, "vocab_size": arguments.vocabulary}
    if arguments.only_write:
        write_gguf(arguments.only_write, arguments.layers, **sizes)
        return
    around = measuring.circumstances()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as own:
        lines = measure(Path(own), arguments, sizes, around)
    if arguments.out:
        with arguments.out.open("a") as file:
            print(*lines, sep="\n", file=file)
    else:
        print(*lines, sep="\n")


def measure(work: Path, arguments: argparse.Namespace, sizes: dict[str, int], around: dict) -> list[str]:
    source = arguments.source or work / "model-Q4_K_M.gguf"
    if not arguments.source:
        write_gguf(source, arguments.layers, **sizes)
    plain = write_source(work / "source", arguments.plain_layers, **sizes)
    sides = {
        "gguf": (source, weights_of(arguments.layers, False, sizes)),
        "bfloat16": (plain, (plain / "model.safetensors").stat().st_size // 2),
    }
    lines = []
    for recipe in arguments.recipes:
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(arguments.rounds):
            for side in list(sides)[:: 1 if number % 2 else -1]:
                options = {"bits": 4, "group_size": 64, "recipe": recipe}
                runs[side].append(run_once(OURS, sides[side][0], work / side, options))
                print(f"  round {number + 1}, {recipe}, {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
        record = {"benchmark": "convert_gguf", "quantity": f"4bit, {recipe}", "rounds": arguments.rounds}
        for side, (path, weights) in sides.items():
            nbytes = (path if path.is_file() else path / "model.safetensors").stat().st_size
            found = {key: measuring.summary([run[key] for run in runs[side]]) for key in runs[side][0]}
            a_weight = {
                key: measuring.summary([1e9 * run[key] / weights for run in runs[side]])
                for key in ("seconds", "cpu_seconds")
            }
            record[side] = {"weights": weights, "source_bytes": nbytes, "ns_a_weight": a_weight} | found
            print(
                f"{recipe:8s} {side:9s} {nbytes / GB:.2f} GB, {weights / GB:.2f} G weights: "
                f"{found['seconds']['median']:.1f} s, {a_weight['seconds']['median']:.2f} ns a weight, "
                f"{a_weight['cpu_seconds']['median']:.2f} CPU ns, {found['peak_bytes']['median'] / 2**20:.0f} MiB, "
                f"{sum(file.stat().st_size for file in (work / side).glob('*.safetensors')) / GB:.2f} GB written",
                flush=True,
            )
        lines.append(json.dumps(record | around))
    for side in sides:
        shutil.rmtree(work / side, ignore_errors=True)
    return lines


if __name__ == "__main__":
    main()
