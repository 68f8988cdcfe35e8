"""How quickly, and in how much memory, checkpoints are converted: beside mlx_lm.convert and mlx_vlm.convert.

    python benchmarks/convert.py [--formats 4bit 8bit ...] [--rounds 3] [--layers 2] [--folder DIR] [--out FILE]

All read one checkpoint, which this file makes: random bfloat16 weights in Hugging Face's layout and the geometry of
Qwen3.5-35B-A3B, with fewer layers in the text model and the vision tower, without MTP (the others drop it). Every
conversion is a process of its own, timed from before its start; they take turns, and who goes first changes from round
to round. Seconds are of the clock, until the command ends and until the disk has all of it: this package's command
waits for the disk, the others leave that to the system. CPU seconds are of all cores. Memory is the most that the
process held, as the kernel counts it from outside (ru_maxrss): the page cache is not in it. Before each, what is still
to be written to disk is written, and the source is read once, so that it is in the page cache.

What is written is compared tensor by tensor, bit by bit. This package gives in_proj_a and in_proj_b 8 bits at least:
below that they differ from the others', and are counted apart. mlx_lm.convert leaves the vision tower out.
In the end this package converts a checkpoint of twice the size. recipe-4bit and the like compare this package with
itself: the default recipe with "uniform".
Knows the three commands and how to make a checkpoint. Knows nothing of how any of them works.
Prints a table, and one JSON line per measured quantity (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]

from benchmarks import measuring  # noqa: E402
from mlx_qwen35.machine.system import is_mac, peak_of  # noqa: E402
from tests.checkpoints import tensor_shapes, tiny_config  # noqa: E402
from tests.text.folders import write_text_files  # noqa: E402

GB = 1e9
VISION_LAYERS = 2
SIZES = {
    "hidden_size": 2048, "head_dim": 256, "num_attention_heads": 16, "num_key_value_heads": 2,
    "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
    "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "vocab_size": 248320, "max_position_embeddings": 262144, "dtype": "bfloat16", "full_attention_interval": 2,
    "rope_parameters": {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
}  # fmt: skip
TOWER = {
    "depth": VISION_LAYERS, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "patch_size": 16,
    "num_position_embeddings": 2304, "out_hidden_size": 2048,
}  # fmt: skip

OURS = """
import sys
from mlx_qwen35 import convert
convert(sys.argv[1], sys.argv[2], **dict(eval(sys.argv[3])))
"""
MLX_LM = """
import sys
from mlx_lm import convert
convert(sys.argv[1], sys.argv[2], **dict(eval(sys.argv[3])))
"""
MLX_VLM = """
import sys
from mlx_vlm.convert import convert
convert(sys.argv[1], sys.argv[2], **dict(eval(sys.argv[3])))
"""


@dataclass(frozen=True)
class Format:
    """Arguments of our convert(), and of theirs."""

    ours: dict
    theirs: dict


def affine(bits: int) -> Format:
    theirs = {"quantize": True, "q_bits": bits, "q_group_size": 64}
    return Format({"bits": bits, "group_size": 64, "recipe": "uniform"}, theirs)


FORMATS = {f"{bits}bit": affine(bits) for bits in (2, 3, 4, 5, 6, 8)} | {
    "mxfp8": Format({"mode": "mxfp8", "recipe": "uniform"},
                    {"quantize": True, "q_mode": "mxfp8", "q_bits": 8, "q_group_size": 32}),
    "unquantized": Format({"bits": None}, {}),
}  # fmt: skip
# Of this package's own recipes: what the default one takes beside "uniform".
RECIPES = {f"recipe-{bits}bit": bits for bits in (2, 3, 4, 5, 6, 8)}


# What is measured: made once, read by all.


def write_source(folder: Path, layers: int, **sizes: int) -> Path:
    """Made by a process of its own: the kernel counts what a parent once held among the memory of its children. sizes:
    other ones than SIZES."""
    if is_mac():  # which does not count so
        _write_source(folder, layers, sizes)
        return folder
    child = os.fork()
    if not child:
        _write_source(folder, layers, sizes)
        os._exit(0)
    if os.waitpid(child, 0)[1]:
        raise SystemExit(f"{folder} could not be written")
    return folder


def _write_source(folder: Path, layers: int, sizes: dict[str, int]) -> None:
    kinds = [("linear_attention", "full_attention")[number % 2] for number in range(layers)]
    config = tiny_config("moe", vision=True, layer_types=kinds, **SIZES | sizes)
    config["vision_config"] |= TOWER
    config |= {"eos_token_id": 248044, "image_token_id": 248056, "video_token_id": 248057,
               "vision_start_token_id": 248053, "vision_end_token_id": 248054}  # fmt: skip
    folder.mkdir(parents=True)
    write_text_files(folder)
    (folder / "config.json").write_text(json.dumps(config))
    patches = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2, "image_mean": [0.5] * 3,
               "image_std": [0.5] * 3, "size": {"shortest_edge": 65536, "longest_edge": 16777216},
               "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen3VLProcessor"}  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(patches))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(patches))
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in tensor_shapes(config).items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Normal values, the same again and again: no converter looks for that.
    block = np.random.default_rng(0).standard_normal(1 << 24, dtype=np.float32) * np.float32(0.02)
    data = memoryview((block.view(np.uint32) >> 16).astype(np.uint16)).cast("B")
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        while end:
            end -= file.write(data[: min(end, len(data))])


# How it is measured.


def run_once(code: str, source: Path, target: Path, options: dict) -> dict[str, float]:
    """Seconds of the clock and of all cores, and bytes of memory, of one conversion in a process of its own."""
    shutil.rmtree(target, ignore_errors=True)
    with open(source if source.is_file() else source / "model.safetensors", "rb") as file:
        while file.read(1 << 24):
            pass
    os.sync()
    command = [sys.executable, "-c", code, str(source), str(target), repr(options)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    start = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        _, status, used = os.wait4(child.pid, 0)
        seconds = time.perf_counter() - start
        os.sync()
        synced = time.perf_counter() - start
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace")[-2000:])
    processor = used.ru_utime + used.ru_stime
    return {"seconds": seconds, "synced_seconds": synced, "cpu_seconds": processor, "peak_bytes": peak_of(used)}


def tensors(folder: Path) -> dict[str, tuple[Path, int, int]]:
    """name -> file, offset and length of its data; those of config and layout are not compared."""
    found = {}
    for path in sorted(folder.glob("model*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, value in header.items():
            if name != "__metadata__":
                begin, end = value["data_offsets"]
                found[name] = path, 8 + length + begin, end - begin
    return found


def is_same(a: tuple[Path, int, int], b: tuple[Path, int, int]) -> bool:
    """Read a little at a time: the kernel counts what this process holds among the memory of those that it starts."""
    if a[2] != b[2]:
        return False
    with open(a[0], "rb") as one, open(b[0], "rb") as other:
        one.seek(a[1])
        other.seek(b[1])
        steps = [min(1 << 20, a[2] - done) for done in range(0, a[2], 1 << 20)]
        return all(one.read(step) == other.read(step) for step in steps)


def compare(ours: Path, theirs: Path) -> dict[str, int]:
    """How many of their tensors are ours bit by bit; how many are in_proj_a and in_proj_b of other bits; the others."""
    mine, counts = tensors(ours), {"equal": 0, "equal_bytes": 0, "other_bits_by_design": 0, "different": 0}
    for name, place in tensors(theirs).items():
        same = name in mine and is_same(mine[name], place)
        small = any(part in name for part in ("in_proj_a.", "in_proj_b."))
        counts["equal" if same else "other_bits_by_design" if small else "different"] += 1
        counts["equal_bytes"] += place[2] if same else 0
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--formats", nargs="+", choices=[*FORMATS, *RECIPES], default=["4bit"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2, help="of the text model; 2 make 5.4 GB")
    parser.add_argument("--experts", type=int, default=SIZES["num_experts"])
    parser.add_argument("--vocabulary", type=int, default=SIZES["vocab_size"])
    parser.add_argument("--source", type=Path, help="a checkpoint that write_source() made, instead of making one")
    parser.add_argument("--only", action="store_true", help="leave out the conversion of twice the size")
    parser.add_argument("--folder", type=Path, help="work here (default: a temporary folder)")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    arguments = parser.parse_args()
    codes = {"mlx-lm": MLX_LM} if measuring.installed("mlx-lm") else {}
    codes |= {"mlx-vlm": MLX_VLM} if measuring.installed("mlx-vlm") else {}
    around = measuring.circumstances() | {"mlx_vlm": measuring.installed("mlx-vlm"), "layers": arguments.layers}
    print(f"35B-A3B cut to {arguments.layers} text and {VISION_LAYERS} vision layers, random bfloat16; "
          f"{around['machine']}\nmlx {around['mlx']}, mlx-lm {around['mlx_lm']}, mlx-vlm {around['mlx_vlm']}, load "
          f"{around['load_before']:.1f}, {around['commit']}; median [least .. most] of {arguments.rounds}")  # fmt: skip
    if arguments.folder:
        arguments.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as own:
        lines = measure(Path(own), arguments, codes, around)
    if arguments.out:
        with arguments.out.open("a") as file:
            print(*lines, sep="\n", file=file)
    else:
        print(*lines, sep="\n")


def measure(work: Path, arguments: argparse.Namespace, codes: dict[str, str], around: dict) -> list[str]:
    sizes = {"num_experts": arguments.experts, "vocab_size": arguments.vocabulary}
    source = arguments.source or write_source(work / "source", arguments.layers, **sizes)
    size = (source / "model.safetensors").stat().st_size
    around = around | {"source_bytes": size}
    print(f"source: {size / GB:.2f} GB")
    lines, peaks = [], {}
    for name in arguments.formats:
        if name in RECIPES:
            asked = {"bits": RECIPES[name], "group_size": 64}
            jobs = {"ours": (OURS, asked | {"recipe": "uniform"}), "default": (OURS, asked)}
        else:
            how = FORMATS[name]
            jobs = {"ours": (OURS, how.ours)} | {side: (code, how.theirs) for side, code in codes.items()}
        runs: dict[str, list[dict[str, float]]] = {side: [] for side in jobs}
        for number in range(arguments.rounds):
            order = list(jobs)[number % len(jobs) :] + list(jobs)[: number % len(jobs)]
            for side in order:
                code, options = jobs[side]
                runs[side].append(run_once(code, source, work / side, options))
                print(f"  round {number + 1}, {name}, {side}: {runs[side][-1]}", file=sys.stderr, flush=True)
        peaks[name] = statistics.median(run["peak_bytes"] for run in runs["ours"])
        for side in jobs:
            equal = {} if side not in codes else compare(work / "ours", work / side)
            lines.append(report(name, side, runs, equal, around))
    for side in ("ours", "default", *codes):
        shutil.rmtree(work / side, ignore_errors=True)
    if arguments.only:
        return lines
    if not arguments.source:
        shutil.rmtree(source)
    # Embedding and head do not double with the layers; so many more layers that all of it does.
    twice = write_source(work / "twice", round(2.62 * arguments.layers) if arguments.layers > 1 else 3, **sizes)
    run = run_once(OURS, twice, work / "ours", jobs["ours"][1])
    grown = (twice / "model.safetensors").stat().st_size
    print(
        f"{name:12s}ours, {grown / GB:.2f} GB: {run['seconds']:.1f} s, {run['cpu_seconds']:.1f} CPU s, "
        f"{run['peak_bytes'] / 2**20:.0f} MiB, {run['peak_bytes'] / peaks[name]:.2f} times the smaller's"
    )
    record = {"benchmark": "convert", "quantity": f"{name}, source of {grown / size:.2f} times the size", "ours": run}
    return [*lines, json.dumps(record | around | {"source_bytes": grown})]


def report(name: str, side: str, runs: dict[str, list[dict[str, float]]], equal: dict[str, int], around: dict) -> str:
    """Print a line of the table, and return the record."""
    units = {"seconds": (1, "s"), "synced_seconds": (1, "s with the disk"), "cpu_seconds": (1, "CPU s"),
             "peak_bytes": (2**20, "MiB")}  # fmt: skip
    found, cells = {}, []
    for key, (unit, label) in units.items():
        ours, theirs = ([run[key] for run in runs[who]] for who in ("ours", side))
        found[key] = measuring.summary(theirs)
        cell = "{median:.1f} [{min:.1f} .. {max:.1f}] ".format(**{k: v / unit for k, v in found[key].items()}) + label
        if side != "ours":
            ratio = measuring.summary([b / a for a, b in zip(ours, theirs, strict=True)])
            found[f"{key}_ratio"] = ratio
            cell += f" x{ratio['median']:.2f}"
        cells.append(f"{cell:48s}")
    tail = ", ".join(f"{value} {key}" for key, value in equal.items())
    print(f"{name:12s}{side:8s}", *cells, tail, flush=True)
    record = {"benchmark": "convert", "quantity": f"{name}, {side}", "rounds": len(runs[side])}
    return json.dumps(record | found | ({"tensors": equal} if equal else {}) | around)


if __name__ == "__main__":
    main()
