"""What is left of a model after quantization, against the size that is left of it: our recipes beside those of others.

    python benchmarks/quality.py [--per-skill 10] [--vlm-python PYTHON] [--only WORD ...] [--again] [--model FOLDER]
    python benchmarks/quality.py --sensitivity          # what an error in each kind of module does

Every candidate is a folder that convert(), mlx_lm.convert or mlx_vlm.convert writes from the demo checkpoint; all are
read by our loader, dequantized, and computed in float32. Bits per weight are those of the text model as it lies in the
files, scales and everything unquantized included. Against the unquantized model on held-out questions (likelihood.py):
KL and perplexity of the tokens of right replies and of prompts, and whole replies that greedy decoding gets right.
Results are kept in benchmarks/results/quality.json and made again where the weights or the code changed; the table and,
with matplotlib, the plot are written beside. mlx-vlm is asked where --vlm-python says which Python has it.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks.likelihood import Examination, Row, questions  # noqa: E402
from mlx_qwen35 import load  # noqa: E402
from mlx_qwen35.checkpoint import quantize  # noqa: E402
from mlx_qwen35.checkpoint.inventory import is_linear, text_tensors  # noqa: E402
from mlx_qwen35.checkpoint.source import open_source  # noqa: E402
from mlx_qwen35.config import USUAL, QuantSpec  # noqa: E402
from mlx_qwen35.conversion import allotment, passes, recipes, rounding, search  # noqa: E402
from mlx_qwen35.conversion.convert import convert  # noqa: E402
from mlx_qwen35.library import demo_folder  # noqa: E402
from mlx_qwen35.library.plan import parse_size  # noqa: E402
from mlx_qwen35.model import Model  # noqa: E402

RESULTS = Path(__file__).with_name("results")
OURS, LM, VLM = "mlx-qwen35", "mlx-lm", "mlx-vlm"
LM_RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_6", "mixed_4_6")
VLM_RECIPES = ("mixed_2_6", "mixed_3_4", "mixed_3_5", "mixed_3_6", "mixed_3_8", "mixed_4_6", "mixed_4_8")
MODES = ("mxfp4", "nvfp4", "mxfp8")
BITS = (2, 3, 4, 5, 6, 8)
TARGETS = (4.857, 4.904, 4.951, 5.066, 5.281, 5.694, 5.818, 6.107, 6.355, 7.594)  # MB of the demo, pictures included
CODE = (allotment, passes, quantize, recipes, rounding, search)  # what our own results hang on


@dataclass(frozen=True)
class Candidate:
    """family: whose it is. asked: the settings of that family's convert()."""

    family: str
    name: str
    asked: dict[str, Any]

    @property
    def key(self) -> str:
        return f"{self.family}: {self.name}"


def candidates(vlm: bool) -> list[Candidate]:
    found = [Candidate(OURS, f"-q --q-bits {b}", {"bits": b}) for b in BITS]
    found += [Candidate(OURS, f"--q-mode {mode}", {"mode": mode}) for mode in MODES]
    found += [Candidate(OURS, name, {"recipe": name}) for name in VLM_RECIPES]
    found += [Candidate(OURS, f"--target-size {t}MB", {"target_size": parse_size(f"{t}MB")}) for t in TARGETS]
    found += [Candidate(LM, f"-q --q-bits {b}", {"q_bits": b, "q_group_size": 64}) for b in BITS]
    found += [Candidate(LM, f"--q-mode {m}", _usual(m)) for m in MODES]
    found += [Candidate(LM, r, {"quant_predicate": r, "q_bits": 4, "q_group_size": 64}) for r in LM_RECIPES]
    if vlm:
        found += [Candidate(VLM, f"-q --q-bits {b}", {"q_bits": b}) for b in BITS]
        found += [Candidate(VLM, f"--q-mode {m}", _usual(m)) for m in MODES]
        found += [Candidate(VLM, r, {"quant_predicate": r}) for r in VLM_RECIPES]
        for kind in ("text", "multimodal"):
            found += [
                Candidate(VLM, f"awq ({kind}) --q-bits {b}", {"quant_method": "awq", "calibration": kind, "q_bits": b})
                for b in (3, 4)
            ]
    return found


def _usual(mode: str) -> dict[str, Any]:
    bits, group_size = USUAL[mode]
    return {"q_mode": mode, "q_bits": bits, "q_group_size": group_size}


def write(candidate: Candidate, source: Path, target: Path, vlm_python: str | None) -> None:
    """Let its family convert `source`; raises RuntimeError with the last line of what it says if it fails."""
    asked = dict(candidate.asked)
    if candidate.family == OURS:
        convert(source, target, **asked)
    elif candidate.family == LM:
        from mlx_lm import convert as convert_lm

        with contextlib.redirect_stdout(io.StringIO()):
            convert_lm(str(source), str(target), quantize=True, **asked)
    else:
        code = "from mlx_vlm.convert import convert; "
        code += f"convert({str(source)!r}, {str(target)!r}, quantize=True, **{asked})"
        ran = subprocess.run([vlm_python or "", "-c", code], capture_output=True, text=True)
        if ran.returncode:
            raise RuntimeError((ran.stderr.strip().splitlines() or ["it failed without a word"])[-1])


def text_values(folder: Path) -> tuple[dict[str, mx.array], float]:
    """The text model of a folder, dequantized, float32; and the bits that the files spend on each of its weights."""
    origin = open_source(folder)
    values, size, count = {}, 0, 0
    for name, shape in text_tensors(origin.config).items():
        module = name.removesuffix(".weight")
        spec = origin.specs.get(module)
        names = {kind: f"{module}.{kind}" for kind in ("weight", "scales", "biases")} if spec else {"weight": name}
        parts = {kind: origin.parts[ours] for kind, ours in names.items() if ours in origin.parts}
        found = {kind: part.finish(part.fetch(), None) for kind, part in parts.items()}
        values[name] = quantize.unpack(found, spec) if spec else found["weight"].astype(mx.float32)
        size += sum(part.nbytes for part in parts.values())
        count += math.prod(shape)
    return values, 8 * size / count


def measure(candidate: Candidate, source: Path, model: Model, exam: Examination, vlm_python: str | None) -> dict:
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "written"
        try:
            write(candidate, source, target, vlm_python)
        except Exception as error:
            if candidate.family == OURS:
                raise
            return {"fails": f"{type(error).__name__}: {error}"[:200]}
        values, bits = text_values(target)
    model.load_weights(list(values.items()), strict=False)
    return {"bits": bits} | exam.compare(model).as_json()


def sensitivity(source: Path, exam: Examination, model: Model) -> None:
    """KL over relative squared error where all modules of one kind have 3 bits, as all of them together would have."""
    values, _ = text_values(source)
    shapes = text_tensors(model.config)
    kinds: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if is_linear(name, shape):
            kinds.setdefault(recipes.kind(name.removesuffix(".weight")), []).append(name)
    print(f"{'kind':<28}{'weights':>9}{'error':>9}{'KL reply':>11}{'KL prompt':>11}{'S reply':>9}{'S prompt':>9}")
    for kind, names in kinds.items():
        errors, changed = [], dict(values)
        for name in names:
            spec = QuantSpec(3, 64, "affine")
            made = quantize.unpack(rounding.pack(values[name].astype(mx.bfloat16), spec, search=True), spec)
            errors.append((mx.square(made - values[name]).sum() / mx.square(values[name]).sum()).item())
            changed[name] = made
        model.load_weights(list(changed.items()), strict=False)
        row, error = exam.compare(model), sum(errors) / len(errors)
        weights = sum(math.prod(shapes[name]) for name in names)
        print(
            f"{kind:<28}{weights:>9}{error:>9.4f}{row.kl_reply:>11.6f}{row.kl_prompt:>11.6f}"
            f"{row.kl_reply / error:>9.4f}{row.kl_prompt / error:>9.4f}",
            flush=True,
        )


def table(rows: dict[str, dict]) -> str:
    lines = [
        "| converter | asked | bits a weight | KL, replies | prompts | perplexity, replies | prompts | replies right |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, row in sorted(rows.items(), key=lambda item: (item[1].get("bits", math.inf), item[0])):
        family, name = key.split(": ", 1)
        if "fails" in row:
            lines.append(f"| {family} | {name} | fails: {row['fails']} | | | | | |")
            continue
        found = Row(**{name: row[name] for name in Row.__dataclass_fields__})
        lines.append(
            f"| {family} | {name} | {row['bits']:.2f} | {found.kl_reply:.2e} | {found.kl_prompt:.2e} | "
            f"{found.perplexity_reply:.4f} | {found.perplexity_prompt:.4f} | {100 * found.replies:.1f} % |"
        )
    return "\n".join(lines) + "\n"


def not_reached(rows: dict[str, dict]) -> list[str]:
    """The others' results than which we have none that is no larger and no further from the source."""
    ours = [row for key, row in rows.items() if key.startswith(OURS) and "bits" in row]
    others = {key: row for key, row in rows.items() if not key.startswith(OURS) and "bits" in row}
    return [
        f"{key} ({measure})"
        for key, row in others.items()
        for measure in ("kl_reply", "kl_prompt")
        if not any(own["bits"] <= row["bits"] and own[measure] <= row[measure] for own in ours)
    ]


def plot(rows: dict[str, dict], path: Path) -> bool:
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, places = pyplot.subplots(1, 2, figsize=(12, 5), sharex=True)
    for place, measure in zip(places, ("kl_reply", "kl_prompt"), strict=True):
        for family, mark in ((OURS, "o"), (LM, "x"), (VLM, "+")):
            found = [(r["bits"], r[measure]) for k, r in rows.items() if k.startswith(family) and "bits" in r]
            if found:
                place.scatter(*zip(*found, strict=True), marker=mark, label=family)
        place.set(xlabel="bits per weight", ylabel=f"KL from the source, {measure.removeprefix('kl_')} tokens (nats)")
        place.set(yscale="log")
        place.grid(alpha=0.3)
    places[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    return True


def digest(source: Path, per_skill: int, code: bool) -> str:
    found = hashlib.sha256((source / "model.safetensors").read_bytes() + str(per_skill).encode())
    for module in CODE if code else ():
        found.update(Path(module.__file__).read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=demo_folder(), help="a checkpoint folder (default: the demo)")
    parser.add_argument("--per-skill", type=int, default=10, help="questions for each of twelve skills")
    parser.add_argument("--vlm-python", help="a Python that has mlx-vlm")
    parser.add_argument("--only", nargs="+", default=[""], help="candidates whose name has one of these words")
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    parser.add_argument("--sensitivity", action="store_true", help="measure kinds of modules and not candidates")
    args = parser.parse_args()
    model, processor = load(str(args.model))
    exam = Examination(model, questions(processor, args.per_skill))
    if args.sensitivity:
        sensitivity(args.model, exam, model)
        return
    RESULTS.mkdir(exist_ok=True)
    store = RESULTS / "quality.json"
    known: dict[str, dict] = json.loads(store.read_text()) if store.exists() else {}
    chosen = candidates(args.vlm_python is not None)
    reach: Callable[[str], bool] = lambda key: any(word in key for word in args.only)  # noqa: E731
    for candidate in chosen:
        made_of = digest(args.model, args.per_skill, candidate.family == OURS)
        if not reach(candidate.key) or (known.get(candidate.key, {}).get("of") == made_of and not args.again):
            continue
        known[candidate.key] = measure(candidate, args.model, model, exam, args.vlm_python) | {"of": made_of}
        print(candidate.key, json.dumps(known[candidate.key]), flush=True)
        store.write_text(json.dumps(known, indent=1) + "\n")
    names = {candidate.key for candidate in chosen} | {key for key in known if key.startswith(VLM)}
    rows = {key: row for key, row in known.items() if key in names}
    short = not_reached(rows)
    print(f"\n{table(rows)}\nothers' results that none of ours reaches at their size: {', '.join(short) or 'none'}")
    (RESULTS / "quality.md").write_text(table(rows))
    if not plot(rows, RESULTS / "quality.png"):
        print("no plot: pip install matplotlib")


if __name__ == "__main__":
    main()
