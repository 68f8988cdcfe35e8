"""What streaming experts from the disk costs: this package beside mlx-vlm's moe_offload, each against itself resident.

    python benchmarks/experts.py [--only decode ...] [--shares 12 25 50] [--rounds 3] [--folder DIR] [--out FILE]

Both read one checkpoint, which this file makes: geometry of Qwen3.5-35B-A3B with fewer layers and a small vocabulary,
random 4-bit experts, everything else bfloat16 (--trunk 4bit: in 4 bits, too, as in published checkpoints). mlx-vlm
needs a second copy in its own form, and the time it takes to write that copy is counted as time to ready. Both may hold
the same number of experts: `share` percent of all.

    decode   seconds a token, streamed less resident of the same project: what streaming costs. The tokens are given,
             so that both make the same choices of experts; which they are is drawn with Zipf's law (--zipf)
    prefill  seconds of a prompt (--prompt tokens) at 25 percent, beside the same resident, and beside reading all
             experts once with eight threads and nothing else
    sweep    the same, with attention and delta net cut small: on a CPU they take most of a prompt's time, and this is
             about experts
    layer    what streaming costs a layer whose experts all are in memory: the synchronization, and Python
    ready    from the start of the process to a model that answers, and before it their copy
    memory   the most that a process held, as the kernel counts it from outside

Warm: the files are in the page cache. Cold: their pages are dropped before every token, before the prompt, and before
the process starts; that is what a machine does whose memory is full. A round is one process for each side and share;
who goes first changes from round to round.
Knows the public calls of both, and how a checkpoint is made. Knows nothing of how either works inside.
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
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT), str(Path(__file__).parent)]

from benchmarks import experts_job, measuring  # noqa: E402
from benchmarks.experts_job import VOCABULARY, Run, drop_pages, warm_pages  # noqa: E402
from mlx_qwen35.machine.files import can_forget  # noqa: E402
from mlx_qwen35.machine.system import peak_of  # noqa: E402
from tests.experts.synthetic import all_expert_bytes, expert_bytes, synthetic_config, write_synthetic  # noqa: E402

PROMPT_SHARE = 25
SIDES = ("ours", "theirs")
PARTS = ("decode", "prefill", "sweep", "layer")
SMALL_MIXERS = {"num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_value_heads": 2,
                "linear_num_key_heads": 1}  # fmt: skip
Runs = dict[tuple[str, int, bool], Run]  # by side, share and whether cold


def bare_read(folder: str | Path, cold: bool) -> float:
    """Seconds to read the routed experts of a folder once, slice by slice, with eight threads."""
    spans = []
    for path in sorted(Path(folder).glob("model*.safetensors")):
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        for name, value in header.items():
            if ".switch_mlp." in name:
                begin, end = value["data_offsets"]
                step = (end - begin) // value["shape"][0]
                spans += [(path, 8 + length + place, step) for place in range(begin, end, step)]
    files = {path: os.open(path, os.O_RDONLY) for path, _, _ in spans}
    (drop_pages if cold else warm_pages)(folder)

    def read(mine: list[tuple[Path, int, int]]) -> None:
        block = memoryview(bytearray(max(size for _, _, size in mine)))
        for path, offset, size in mine:
            assert os.preadv(files[path], [block[:size]], offset) == size

    start = time.perf_counter()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(read, (spans[number::8] for number in range(8))))
    seconds = time.perf_counter() - start
    for descriptor in files.values():
        os.close(descriptor)
    return seconds


def run_child(job: Run) -> Run:
    """A job in a process of its own, and the most memory that it held."""
    job = job | {"folder": str(job["folder"]), "start": time.time()}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(CHECKOUT)}
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        command = [sys.executable, experts_job.__file__, json.dumps(job)]
        child = subprocess.Popen(command, env=environment, stdout=output, stderr=errors)
        _, status, used = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0), errors.seek(0)
        if child.returncode:
            raise RuntimeError(errors.read().decode(errors="replace")[-3000:])
        found = json.loads(output.read().decode().splitlines()[-1])
    peak = peak_of(used)
    short = {key: job[key] for key in ("side", "slots", "prompt", "cold")}
    print(f"  {short}: {found | {'peak': peak}}", file=sys.stderr, flush=True)
    return found | {"peak": peak}


def repack(source: Path, target: Path) -> float:
    """Seconds that their copy takes, from files that are not in memory."""
    shutil.rmtree(target, ignore_errors=True)
    os.sync()
    drop_pages(source)
    start = time.perf_counter()
    command = [sys.executable, "-m", "mlx_vlm.moe_offload", "--build", str(source), "--out", str(target)]
    subprocess.run(command, check=True, capture_output=True)
    seconds = time.perf_counter() - start
    os.sync()  # what is not on the disk cannot be dropped from memory
    return seconds


class Checkpoints:
    """The checkpoint of a measurement, and mlx-vlm's copy of it."""

    def __init__(self, folder: Path, layers: int, *, small_mixers: bool = False, trunk: str = "bfloat16"):
        config = synthetic_config("35B", layers, vocab_size=VOCABULARY, **(SMALL_MIXERS if small_mixers else {}))
        self.layers, self.trunk, self.experts = layers, trunk, config["text_config"]["num_experts"]
        self.expert_bytes, self.all_bytes = expert_bytes(config), all_expert_bytes(config)
        name = f"{layers}-layers" + ("-small-mixers" if small_mixers else "") + f"-{trunk}".removesuffix("-bfloat16")
        self.source, self.copy = folder / name, folder / f"{name}-offload"
        if not self.source.exists():
            write_synthetic(self.source, config, plain_trunk=trunk == "bfloat16")
        os.sync()
        self.repacked: list[float] = []

    def jobs(self, share: int | None, **more: Any) -> dict[str, Run]:
        """A job for each side, with `share` percent of the experts in memory; None: all."""
        slots = None if share is None else max(8, self.experts * share // 100)
        common = {"slots": slots, "layers": self.layers, "expert_bytes": self.expert_bytes, **more}
        folders = {"ours": self.source, "theirs": self.source if slots is None else self.copy}
        return {side: common | {"side": side, "folder": folders[side]} for side in SIDES}


def measure(at: Checkpoints, cases: list[tuple[int, bool]], arguments: argparse.Namespace, prompt: int) -> list[Runs]:
    """The runs of each round; a case is a share and whether files are cold while it runs. Share 100 is resident."""
    known = Kept(arguments.keep, f"{at.source.name}, {prompt} tokens")
    results = known.rounds(at.repacked)
    for number in range(len(results), len(results) + arguments.rounds):
        if "theirs" in arguments.sides:
            at.repacked.append(repack(at.source, at.copy))
        runs: Runs = {}
        for share, cold in cases:
            jobs = at.jobs(
                None if share == 100 else share, seed=number, prompt=prompt, cold=cold, zipf=arguments.zipf,
                settle=arguments.settle, tokens=arguments.tokens,
            )  # fmt: skip
            sides = arguments.sides if number % 2 == 0 else arguments.sides[::-1]
            for side in sides:
                drop_pages(jobs[side]["folder"])
                if prompt and not cold:
                    warm_pages(jobs[side]["folder"])
                runs[side, share, cold] = run_child(jobs[side])
        known.add(runs, at.repacked)
        results.append(runs)
    return results


class Kept:
    """Rounds of earlier calls with the same --keep, of one measurement."""

    def __init__(self, path: Path | None, what: str):
        self.path, self.what = path, what

    def rounds(self, repacked: list[float]) -> list[Runs]:
        """repacked: gets what making their copy took in those rounds."""
        lines = self.path.read_text().splitlines() if self.path is not None and self.path.exists() else []
        found = [line for line in map(json.loads, lines) if line["what"] == self.what]
        repacked += [line["repacked"] for line in found if line["repacked"] is not None]
        return [{(side, share, cold): run for side, share, cold, run in line["runs"]} for line in found]

    def add(self, runs: Runs, repacked: list[float]) -> None:
        if self.path is not None:
            line = {"what": self.what, "repacked": repacked[-1] if repacked else None}
            with self.path.open("a") as file:
                print(json.dumps(line | {"runs": [(*key, run) for key, run in runs.items()]}), file=file)


class Report:
    """Prints a line of the table for every quantity, and keeps its record."""

    def __init__(self, around: Run):
        self.around, self.lines = around, []

    def add(self, name: str, unit: str, values: dict[str, list[float]], **more: Any) -> None:
        """values: a figure a round, by side; the ratio is formed round by round."""
        scale = {"ms": 1e3, "GB": 1e-9}.get(unit, 1)
        found = {side: measuring.summary([value * scale for value in each]) for side, each in values.items()}
        if len(values) == 2:
            pairs = zip(*values.values(), strict=True)
            found["ratio"] = measuring.summary([b / a if a else float("inf") for a, b in pairs])
        cells = [f"{side} {s['median']:.4g} [{s['min']:.4g} .. {s['max']:.4g}]" for side, s in found.items()]
        print(f"{name:46s}{unit:4s}", *(f"{cell:38s}" for cell in cells), flush=True)
        record = {"benchmark": "experts", "quantity": name, "unit": unit, "rounds": len(next(iter(values.values())))}
        self.lines.append(json.dumps(record | found | more | self.around))


def report_decode(report: Report, results: list[Runs], shares: list[int], sides: tuple[str, ...]) -> None:
    def mean(run: Run) -> float:
        return (run["warm"]["seconds"] + run["cold"]["seconds"]) / 2

    resident = {side: [mean(runs[side, 100, False]) for runs in results] for side in sides}
    report.add("decode, resident", "ms", resident)
    for share in shares:
        for state in ("warm", "cold"):
            each = {side: [runs[side, share, False][state] for runs in results] for side in sides}
            seconds = {side: [run["seconds"] for run in runs] for side, runs in each.items()}
            report.add(f"decode, {state}, {share} %", "ms", seconds)
            over = {s: [a - b for a, b in zip(seconds[s], resident[s], strict=True)] for s in sides}
            report.add(f"decode, {state}, {share} %: streaming alone", "ms", over)
        hits = {side: [run["hits"] / (run["hits"] + run["misses"]) for run in runs] for side, runs in each.items()}
        report.add(f"hit rate, {share} %", "", hits)
    for share in shares:
        report.add(f"memory, {share} %", "GB", {s: [runs[s, share, False]["peak"] for runs in results] for s in sides})


def report_ready(report: Report, results: list[Runs], share: int, repacked: list[float],
                 sides: tuple[str, ...]) -> None:  # fmt: skip
    ready = {side: [runs[side, share, False]["ready"] for runs in results] for side in sides}
    report.add(f"ready, {share} %, cold files, copy made before", "s", ready)
    if "theirs" in sides:
        first = [a + b for a, b in zip(ready["theirs"], repacked, strict=True)]
        report.add(f"ready the first time, {share} %", "s", ready | {"theirs": first})


def report_prefill(report: Report, what: str, results: list[Runs], bare: dict[bool, list[float]],
                   sides: tuple[str, ...]) -> None:  # fmt: skip
    def seconds(side: str, share: int, cold: bool) -> list[float]:
        return [runs[side, share, cold]["prompt"]["seconds"] for runs in results]

    resident = {side: seconds(side, 100, False) for side in sides}
    report.add(f"{what}, resident", "s", resident)
    for cold in (False, True):
        state = "cold" if cold else "warm"
        streamed = {side: seconds(side, PROMPT_SHARE, cold) for side in sides}
        report.add(f"{what}, {state}, {PROMPT_SHARE} %", "s", streamed)
        over = {side: [a - b for a, b in zip(streamed[side], resident[side], strict=True)] for side in sides}
        report.add(f"{what}, {state}: streaming alone", "s", over)
        report.add(f"{what}, reading all experts once, {state}", "s", {"bare": bare[cold]})
        least = [a + b for a, b in zip(resident["ours"], bare[cold], strict=True)]
        report.add(f"{what}, {state}, over resident + bare reading", "",
                   {"ours": [a / b for a, b in zip(streamed["ours"], least, strict=True)]})  # fmt: skip
    peaks = {side: [runs[side, PROMPT_SHARE, False]["peak"] for runs in results] for side in sides}
    report.add(f"memory, {what}, {PROMPT_SHARE} %", "GB", peaks)


def measure_layer(rounds: int, layers: int = 16, tokens: int = 120) -> list[float]:
    """Seconds a layer that a token takes longer when it is streamed all the same, though all is in memory; tiny layers.
    Of each round the median of the differences, token by token."""
    import mlx.core as mx

    from mlx_qwen35.checkpoint import stream
    from mlx_qwen35.checkpoint.load import load_model
    from mlx_qwen35.experts.budget import StreamPlan
    from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

    config = tiny_config("moe", num_experts=32, num_experts_per_tok=8, num_hidden_layers=layers)
    plan = StreamPlan((32,) * layers, group=8, chunk=64, tile=64, cache_limit=64 << 20, memory=1 << 30)

    def more(models: Sequence[Any]) -> float:
        """Seconds a token that the second takes longer, in turns; the first third of them is left out."""
        caches, found = [model.make_cache() for model in models], [[] for _ in models]
        for number in range(tokens):
            for model, cache, mine in zip(models, caches, found, strict=True):
                start = time.perf_counter()
                mx.eval(model(mx.array([[number % 90]]), cache))
                mine.append(time.perf_counter() - start)
        pairs = [*zip(*found, strict=True)][tokens // 3 :]
        return statistics.median(streamed - resident for resident, streamed in pairs)

    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), config, random_tensors(config), layout="mlx")
        resident = load_model(folder)
        with patch.object(stream, "streamed_layouts", lambda source, *_: stream.expert_layouts(source)):
            models = resident, load_model(folder, stream=plan)
        return [more(models) / layers for _ in range(rounds + 1)][1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--shares", nargs="+", type=int, default=[12, 25, 50], help="percent of the experts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=8, help="for decoding; 8 have 3.6 GB of experts")
    parser.add_argument("--trunk", choices=("bfloat16", "4bit"), default="bfloat16", help="what decodes beside experts")
    parser.add_argument("--prefill-layers", type=int, default=2, help="CPUs take half a minute a layer in mlx-vlm")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--settle", type=int, default=48, help="tokens before those that are measured")
    parser.add_argument("--tokens", type=int, default=24, help="measured warm, and as many cold")
    parser.add_argument("--zipf", type=float, default=1.5, help="how much the frequent tokens are preferred")
    parser.add_argument("--folder", type=Path, help="work here, and leave the checkpoints there")
    parser.add_argument("--keep", type=Path, help="add rounds to those of this file, and report all of them")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    arguments = parser.parse_args()
    if not can_forget():
        raise SystemExit("this needs a system that can be told to forget files; on a Mac see benchmarks/mac.py")
    if "theirs" in arguments.sides and measuring.installed("mlx-vlm") is None:
        raise SystemExit("mlx-vlm is not installed; pip install mlx-vlm==0.7.10, or give --sides ours")
    around = measuring.circumstances() | {"mlx_vlm": measuring.installed("mlx-vlm"), "zipf": arguments.zipf}
    print(f"{around['machine']}; mlx {around['mlx']}, mlx-vlm {around['mlx_vlm']}, load {around['load_before']:.1f}, "
          f"{around['commit']}; median [least .. most] of {arguments.rounds}")  # fmt: skip
    report = Report(around)
    with tempfile.TemporaryDirectory() as own:
        folder = arguments.folder or Path(own)
        folder.mkdir(parents=True, exist_ok=True)
        if "decode" in arguments.only:
            at = Checkpoints(folder, arguments.layers, trunk=arguments.trunk)
            report.around = around | {"layers": at.layers, "expert_bytes": at.all_bytes, "trunk": at.trunk}
            print(f"decode: 35B-A3B cut to {at.layers} layers, {at.all_bytes / 1e9:.1f} GB of experts, {at.trunk}")
            results = measure(at, [(share, False) for share in (100, *arguments.shares)], arguments, 0)
            report_decode(report, results, arguments.shares, arguments.sides)
            report_ready(report, results, arguments.shares[-1], at.repacked, arguments.sides)
            if not arguments.folder:
                shutil.rmtree(at.source), shutil.rmtree(at.copy, ignore_errors=True)
        for what in ("prefill", "sweep"):
            if what in arguments.only:
                at = Checkpoints(folder, arguments.prefill_layers, small_mixers=what == "sweep")
                report.around = around | {"layers": at.layers, "expert_bytes": at.all_bytes, "prompt": arguments.prompt}
                print(f"{what} of {arguments.prompt} tokens: 35B-A3B cut to {at.layers} layers, "
                      f"{at.all_bytes / 1e9:.1f} GB of experts")  # fmt: skip
                cases = [(100, False), (PROMPT_SHARE, False), (PROMPT_SHARE, True)]
                results = measure(at, cases, arguments, arguments.prompt)
                bare = {cold: [bare_read(at.source, cold) for _ in results] for cold in (False, True)}
                report_prefill(report, what, results, bare, arguments.sides)
    if "layer" in arguments.only:
        report.around = around | {"layers": 16}
        report.add("a layer, all in memory: streaming alone", "ms", {"ours": measure_layer(arguments.rounds)})
    if arguments.out:
        with arguments.out.open("a") as file:
            print(*report.lines, sep="\n", file=file)
    else:
        print(*report.lines, sep="\n")


if __name__ == "__main__":
    main()
