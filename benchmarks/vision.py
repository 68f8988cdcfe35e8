"""How quickly, and in how much memory, pictures and videos become features: this package beside mlx-vlm.

    python benchmarks/vision.py [--cases 4mp video256 ...] [--rounds 5] [--layers 12] [--out FILE]

Both sides read the same folder, which this file makes: a checkpoint with random weights whose vision tower has the
shape of the published 0.8B (--layers and --heads cut it, and then the output says so), JPEG pictures and H.264 videos.
A round of a case is one process a side, and which goes first changes from round to round. Measured in each, warm (a
small picture or video went the same way before):

    prepare   file -> token ids and patch rows, as the user of either calls it
    encode    patch rows -> features, computed
    memory    the most that the process held, on Linux of each step by itself, elsewhere of the whole

Seconds are of the clock; CPU seconds, those of all cores together, are given beside them, because a busy machine
distorts them less.

In the first round the rows of both are compared, and the features that both make of the same rows.
Knows the public calls of both, and how to make media. Knows nothing of how either works inside.
Prints a table, and one JSON line per measured quantity (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from mlx_qwen35.machine.system import forget_peak, free_memory, is_mac, peak_resident_memory  # noqa: E402

MIB = 1 << 20
LAYERS, HEADS, WIDTH = 12, 12, 1024  # of the published tower; of the text model that reads its features
LARGEST = {"image": 16_777_216, "video": 25_165_824}  # pixels, in the published preprocessor files
LEAST = {"image": 65_536, "video": 4_096}
RATE, SAMPLED, KEYFRAME = 24, 2, 48  # frames a second of the files, and taken of them; frames between keyframes


@dataclass(frozen=True)
class Case:
    kind: str
    width: int
    height: int
    frames: int = 1  # that are taken

    @property
    def megapixels(self) -> float:
        return self.width * self.height / 1e6


CASES = {
    "1mp": Case("image", 1152, 864),
    "4mp": Case("image", 2272, 1704),
    "16mp": Case("image", 4608, 3456),
    "video32": Case("video", 1280, 720, 32),
    "video256": Case("video", 1280, 720, 256),
}
WARM = {"image": Case("image", 320, 256), "video": Case("video", 320, 256, 4)}
STEPS = ("prepare", "encode")


# What is measured: made once, read by both.


def picture(seed: int, width: int, height: int):
    """Soft colours with some grain, which a JPEG holds about as well as a photograph."""
    from PIL import Image

    rng = np.random.RandomState(seed)
    soft = Image.fromarray(rng.randint(0, 256, (height // 32 + 1, width // 32 + 1, 3), dtype=np.uint8))
    soft = np.asarray(soft.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    return Image.fromarray((soft + rng.randint(-6, 7, soft.shape)).clip(0, 255).astype(np.uint8))


def write_media(path: Path, case: Case, shrink: int) -> None:
    width, height = (max(64, side // shrink) // 2 * 2 for side in (case.width, case.height))
    if case.kind == "image":
        picture(1, width, height).save(path, quality=90)
        return
    import av

    still = np.asarray(picture(2, width + 256, height + 64))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "g": str(KEYFRAME)})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number in range(case.frames * RATE // SAMPLED):
            x, y = 2 * number % 256, number // 4 % 64
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(still[y : y + height, x : x + width]))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def media_path(folder: Path, name: str) -> Path:
    return folder / f"{name}.{'mp4' if 'video' in name else 'jpg'}"


def tower(layers: int, heads: int) -> dict[str, int]:
    """What vision_config says of it: heads of 64, and an MLP four times as wide."""
    return {"depth": layers, "num_heads": heads, "hidden_size": 64 * heads, "intermediate_size": 256 * heads}


def write_folder(folder: Path, names: list[str], shape: dict[str, int], shrink: int) -> None:
    """The checkpoint, with the demo's tokenizer and the published limits of pixels, and the media of the cases."""
    from tests.checkpoints import random_tensors, tiny_config, write_checkpoint

    demo = CHECKOUT / "mlx_qwen35/demo"
    tokens = json.loads((demo / "config.json").read_text())
    config = tiny_config("dense", vision=True, hidden_size=WIDTH, vocab_size=tokens["text_config"]["vocab_size"],
                         max_position_embeddings=1 << 18)  # fmt: skip
    config |= {key: tokens[key] for key in tokens if key.endswith("_token_id")}
    config["text_config"]["eos_token_id"] = tokens["text_config"]["eos_token_id"]
    config["vision_config"] |= shape | {"num_position_embeddings": 2304, "patch_size": 16}
    write_checkpoint(folder, config, random_tensors(config), dtype="bfloat16")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(demo / name, folder)
    for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
        settings = json.loads((demo / name).read_text())
        settings["size"] = {"longest_edge": LARGEST[kind], "shortest_edge": LEAST[kind]}
        (folder / name).write_text(json.dumps(settings))
    for kind, case in WARM.items():
        write_media(media_path(folder, f"warm-{kind}"), case, 1)
    for name in names:
        write_media(media_path(folder, name), CASES[name], shrink)


# One side in a process of its own.


class Ours:
    def __init__(self, folder: Path) -> None:
        from mlx_qwen35 import load

        self.model, self.processor = load(folder)

    def prepare(self, kind: str, path: Path) -> object:
        return self.processor.prompt("What is this?", **{f"{kind}s": [str(path)]})

    def encode(self, prompt: object) -> np.ndarray:
        return self.model.encode_media(prompt.media)[0]

    def facts(self, kind: str, prompt: object) -> tuple[list[int], int, np.ndarray]:
        """-> grid, placeholders among the tokens, rows"""
        config = self.model.config
        token = config.image_token_id if kind == "image" else config.video_token_id
        return list(prompt.media[0].grid), prompt.tokens.count(token), prompt.media[0].pixels

    def encode_rows(self, rows: np.ndarray, grid: list[int]) -> np.ndarray:
        return self.model.vision.encode([rows], [tuple(grid)])[0]


class Theirs:
    def __init__(self, folder: Path) -> None:
        import mlx.core as mx
        from mlx_vlm import load

        self.mx = mx
        self.model, self.processor = load(str(folder))
        if mx.default_device() == mx.cpu:  # as this package does by itself: 16 bits are slow there
            self.model.set_dtype(mx.float32)
        mx.eval(self.model.parameters())

    def prepare(self, kind: str, path: Path) -> dict:
        from mlx_vlm.utils import prepare_inputs

        text = f"<|im_start|>user\n<|vision_start|><|{kind}_pad|><|vision_end|>What is this?<|im_end|>\n"
        return prepare_inputs(self.processor, prompts=[text], **{f"{kind}s": [str(path)]})

    def encode(self, inputs: dict) -> np.ndarray:
        kind = "image" if "image_grid_thw" in inputs else "video"
        rows = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        return self._encode(rows, inputs[f"{kind}_grid_thw"])

    def _encode(self, rows: object, grid: object) -> np.ndarray:
        tower = self.model.vision_tower
        features, _ = tower(rows.astype(tower.patch_embed.proj.weight.dtype), grid)
        self.mx.eval(features)
        return features

    def facts(self, kind: str, inputs: dict) -> tuple[list[int], int, np.ndarray]:
        token = getattr(self.processor, f"{kind}_token_id")
        rows = inputs["pixel_values" if kind == "image" else "pixel_values_videos"]
        grid = inputs[f"{kind}_grid_thw"][0].tolist()
        return grid, int((inputs["input_ids"] == token).sum()), np.array(rows)

    def encode_rows(self, rows: np.ndarray, grid: list[int]) -> np.ndarray:
        return self._encode(self.mx.array(rows), self.mx.array([grid]))


def run_side(
    side: type, name: str, folder: Path, steps: list[str], most: int, check: Path | None
) -> dict[str, object]:
    """The figures of one process. check: where the rows and features of both sides are left to be compared."""
    if most and not is_mac():  # an allocation beyond fails, instead of the machine
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    case, ours = CASES[name], side is Ours
    reader = side(folder)
    reader.encode(reader.prepare(case.kind, media_path(folder, f"warm-{case.kind}")))
    gc.collect()
    forget_peak()
    found: dict[str, object] = {"loaded": peak_resident_memory()}
    times: list[tuple[float, float]] = []
    while len(times) < 5 and sum(wall for wall, _ in times) < 1:
        prepared = None
        start = time.perf_counter(), time.process_time()
        prepared = reader.prepare(case.kind, media_path(folder, name))
        times.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    found["prepare"], found["prepare_cpu"] = (statistics.median(kind) for kind in zip(*times, strict=True))
    found["prepare_memory"] = peak_resident_memory()
    grid, found["tokens"], rows = reader.facts(case.kind, prepared)
    found["grid"] = grid
    if check is not None:
        np.save(check / f"rows-{side.__name__}.npy", rows)
    del rows
    if "encode" not in steps:
        return found
    print(json.dumps(found), flush=True)  # what is known if the process does not survive
    gc.collect()
    forget_peak()
    try:
        start = time.perf_counter(), time.process_time()
        features = reader.encode(prepared)
        found |= {"encode": time.perf_counter() - start[0], "encode_cpu": time.process_time() - start[1]}
        found["encode_memory"] = peak_resident_memory()
        if check is not None:
            if not ours:
                features = reader.encode_rows(np.load(check / "rows-Ours.npy"), grid)
            np.save(check / f"features-{side.__name__}.npy", np.array(features))
    except (RuntimeError, MemoryError) as error:
        found["failed"] = str(error)
    return found


# Both in turns.


def start_side(side: str, name: str, check: Path | None, folder: Path, steps: list[str], most: int) -> dict:
    command = [sys.executable, __file__, "--side", side, "--cases", name, "--folder", str(folder)]
    command += ["--memory", str(most), "--steps", *steps, *(["--check", str(check)] if check else [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode < 0 and done.stdout:  # MLX on a CPU does not always report that memory is out
        ended = f"ended by {signal.Signals(-done.returncode).name} within {most >> 30} GiB"
        return json.loads(done.stdout.splitlines()[-1]) | {"failed": ended}
    if done.returncode:
        raise SystemExit(f"a measured process failed ({side}, {name}):\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(check: Path, ours: dict, theirs: dict) -> dict[str, float]:
    """How far rows and features are apart. Ends the run where the rows are not of the same picture; features that
    differ are a result, which report() shows."""
    for key in ("grid", "tokens"):
        if ours[key] != theirs[key]:
            raise SystemExit(f"not the same work: {key} {ours[key]} here, {theirs[key]} in mlx-vlm")
    a, b = (np.load(check / f"rows-{side}.npy", mmap_mode="r") for side in ("Ours", "Theirs"))
    gaps = np.array([(np.abs(a[i : i + 4096] - b[i : i + 4096]).max(), np.abs(a[i : i + 4096] - b[i : i + 4096]).mean())
                     for i in range(0, len(a), 4096)])  # fmt: skip
    found = {"rows_most": float(gaps[:, 0].max()), "rows_mean": float(gaps[:, 1].mean())}
    if "encode" in theirs and "encode" in ours:
        a, b = (np.load(check / f"features-{side}.npy") for side in ("Ours", "Theirs"))
        found |= {"features_most": float(np.abs(a - b).max()), "features_std": float(b.std())}
    return found


def measure(name: str, rounds: int, seconds: float, folder: Path, *how: object) -> tuple[list[tuple[dict, dict]], dict]:
    """-> one pair (ours, theirs) a round, and how far apart they are. No round begins after `seconds`, save the
    first."""
    pairs, apart, begin = [], {}, time.time()
    while len(pairs) < rounds and (not pairs or time.time() - begin < seconds):
        with tempfile.TemporaryDirectory(dir=folder) as check:
            where = None if pairs else Path(check)
            sides = ("Theirs", "Ours") if len(pairs) % 2 else ("Ours", "Theirs")
            found = {side: start_side(side, name, where, folder, *how) for side in sides}
            if where:
                apart = compare(where, found["Ours"], found["Theirs"])
        pairs.append((found["Ours"], found["Theirs"]))
    return pairs, apart


def figures(pairs: list[tuple[dict, dict]], frames: int) -> dict[str, tuple[str, list[tuple[float, float]]]]:
    """quantity -> unit, (ours, theirs) a round; without those that one side could not do"""

    def both(of) -> list[tuple[float, float]]:
        return [(of(a), of(b)) for a, b in pairs]

    steps = [step for step in STEPS if all(step in side for pair in pairs for side in pair)]
    rows = {step: ("s", both(lambda side, step=step: side[step])) for step in steps}
    if len(steps) == len(STEPS):
        rows["both"] = ("s", both(lambda side: side["prepare"] + side["encode"]))
        unit = "images/s" if frames == 1 else "frames/s"
        rows[unit] = (unit, both(lambda side: frames / (side["prepare"] + side["encode"])))
    for step in steps:
        rows[f"{step}, of all cores"] = ("CPU s", both(lambda side, step=step: side[f"{step}_cpu"]))
        rows[f"memory of {step}"] = ("MiB", both(lambda side, step=step: side[f"{step}_memory"] / MIB))
    if len(steps) == len(STEPS):
        whole = both(lambda side: max(side["prepare_memory"], side["encode_memory"]) / MIB)
        rows["memory"] = ("MiB", whole)
        rows["memory over loaded"] = ("MiB", [
            (a - x["loaded"] / MIB, b - y["loaded"] / MIB) for (a, b), (x, y) in zip(whole, pairs, strict=True)
        ])  # fmt: skip
    return rows


def report(name: str, pairs: list[tuple[dict, dict]], apart: dict, around: dict) -> list[str]:
    """Prints the table of one case; -> its JSON lines"""
    from benchmarks.measuring import summary

    case, first = CASES[name], pairs[0][0]
    t, h, w = first["grid"]
    taken = f"{case.frames} frames of {case.width} x {case.height}" if case.frames > 1 else f"{case.megapixels:.1f} MP"
    print(f"\n{name}: {taken} -> grid {t} x {h} x {w}, {first['tokens']} tokens; {len(pairs)} rounds")
    print("  apart: " + ", ".join(f"{key} {value:.2g}" for key, value in apart.items()))
    if not apart.get("features_most", 0) <= 0.02 * apart.get("features_std", 1):
        print("  The features of equal rows differ: one side is wrong, and its figures are those of other work.")
    for who, side in zip(("mlx_qwen35", "mlx-vlm"), pairs[0], strict=True):
        if "failed" in side:
            alone = [pair[who == "mlx-vlm"] for pair in pairs]
            print(f"  {who}: encode failed: {side['failed']} (prepare took {alone[0]['prepare']:.2f} s)")
            other = [pair[who != "mlx-vlm"].get("encode") for pair in pairs]
            print(f"  the other's encode: {[x and round(x, 1) for x in other]} s, "
                  f"{[round(pair[who != 'mlx-vlm'].get('encode_memory', 0) / MIB) for pair in pairs]} MiB")  # fmt: skip
    print(f"  {'':20s}{'mlx_qwen35':>27s}{'mlx-vlm':>27s}   better by")
    lines = []
    for quantity, (unit, rows) in figures(pairs, case.frames).items():
        ours, theirs = (summary([row[i] for row in rows]) for i in (0, 1))
        ratio = summary([a / b if unit.endswith("/s") else b / a for a, b in rows])
        digits = 0 if unit == "MiB" else 3
        cells = [f"{s['median']:.{digits}f} [{s['min']:.{digits}f} .. {s['max']:.{digits}f}]" for s in (ours, theirs)]
        spread = f"{ratio['median']:.2f} [{ratio['min']:.2f} .. {ratio['max']:.2f}]"
        print(f"  {quantity:20s}{cells[0]:>27s}{cells[1]:>27s}   {spread}  ({unit})")
        record = {"benchmark": "vision", "case": name, "quantity": quantity, "unit": unit, "rounds": len(rows)}
        lines.append(json.dumps(record | {"ours": ours, "theirs": theirs, "ratio": ratio} | apart | around))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES], default=[*CASES])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=900, help="begin no further round of a case after as many")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=[*STEPS], help="prepare alone is quick")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the tower, instead of the published 12")
    parser.add_argument("--heads", type=int, default=HEADS, help="of the tower, each 64 wide, instead of the 12")
    parser.add_argument("--shrink", type=int, default=1, help="divide the sides of the media, for a quick try")
    parser.add_argument("--memory", type=int, default=0, help="bytes a process may take (85 %% of what is free)")
    parser.add_argument("--folder", type=Path, help="keep checkpoint and media here, and take those that are here")
    parser.add_argument("--out", type=Path, help="append the JSON lines to this file")
    parser.add_argument("--side", choices=["Ours", "Theirs"], help=argparse.SUPPRESS)
    parser.add_argument("--check", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        side = {"Ours": Ours, "Theirs": Theirs}[arguments.side]
        found = run_side(
            side, arguments.cases[0], arguments.folder, arguments.steps, arguments.memory, arguments.check
        )
        print(json.dumps(found), flush=True)
        os._exit(0)  # freeing gigabytes in order is nobody's figure

    from benchmarks.measuring import circumstances, installed

    if installed("mlx-vlm") is None:
        raise SystemExit("mlx-vlm is not installed, so there is nothing to compare with: pip install mlx-vlm")
    shape = tower(arguments.layers, arguments.heads)
    around = circumstances() | {"mlx_vlm": installed("mlx-vlm"), "tower": shape}
    most = arguments.memory or int(free_memory() * 0.85)
    around["memory_limit_mib"] = most // MIB
    cuts = [f"{left} of its {whole} {what}" for left, whole, what in
            ((arguments.layers, LAYERS, "layers"), (arguments.heads, HEADS, "heads")) if left != whole]  # fmt: skip
    cut = f", cut to {' and '.join(cuts)}" if cuts else ""
    print(f"vision tower of the 0.8B (768 wide, 12 heads of 64){cut}, random weights; {around['machine']}")
    print(f"mlx {around['mlx']}, mlx-vlm {around['mlx_vlm']}, load {around['load_before']:.1f}, {around['commit']}; "
          f"a process may take {most >> 30} GiB; median [least .. most]")  # fmt: skip
    if arguments.shrink != 1:
        print(f"sides divided by {arguments.shrink}: a try, not a figure")
    with tempfile.TemporaryDirectory() as own:
        folder = arguments.folder or Path(own)
        made = all(media_path(folder, name).exists() for name in arguments.cases)
        if not (made and (folder / "config.json").exists()):
            write_folder(folder, arguments.cases, shape, arguments.shrink)
        for name in arguments.cases:
            pairs, apart = measure(name, arguments.rounds, arguments.seconds, folder, arguments.steps, most)
            lines = report(name, pairs, apart, around)
            if arguments.out:  # after each case: a later one may take hours
                with arguments.out.open("a") as file:
                    print(*lines, sep="\n", file=file)
            else:
                print(*lines, sep="\n")


if __name__ == "__main__":
    main()
