"""How many held-out questions a checkpoint answers right, skill by skill, run by this package.

    python benchmarks/skills.py [--model FOLDER] [--per-skill 200] [--skills arithmetic where ...] [--processes]
        [--json FILE]

The questions are those of the demo's curriculum (tools/train_demo), the same on every machine and never trained on.
Those in words are asked in batches in this process; those about pictures and videos one by one through the command
line, from files: PNG, JPEG (quality 90), MP4 (H.264). --processes starts the command for each of them.
For the demo the reference's shares are printed beside (tools/train_demo/accuracy.json: transformers on the same files).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CURRICULUM = ROOT / "tools" / "train_demo"
sys.path[:0] = [str(ROOT), str(CURRICULUM)]

from case import Case, held_out_set  # noqa: E402
from media_files import file_kinds, write_files  # noqa: E402
from picture_skills import PICTURE_SKILLS  # noqa: E402
from text_skills import TEXT_SKILLS  # noqa: E402

from benchmarks.command_line import CommandLine  # noqa: E402
from mlx_qwen35 import Sampling, load  # noqa: E402
from mlx_qwen35.generation import generate_batch  # noqa: E402

SKILLS = {**TEXT_SKILLS, **PICTURE_SKILLS}
MAX_TOKENS = 160
BAR = 0.01  # how far from the reference a share may be

Shares = Iterator[tuple[str, str, float]]  # skill, kind of file ("" for text), share of right answers


def grouped(model_prompts: list[tuple[Case, Any]], most: int = 32) -> list[list[tuple[Case, Any]]]:
    """Cases with prompts of like length, so that little is padded."""
    ordered = sorted(model_prompts, key=lambda pair: len(pair[1].tokens))
    return [ordered[i : i + most] for i in range(0, len(ordered), most)]


def score_texts(folder: str | None, skills: list[str], per_skill: int) -> Shares:
    model, processor = load(folder)
    cases = held_out_set({skill: TEXT_SKILLS[skill] for skill in skills}, per_skill)
    asked = [(c, processor.prompt(c.messages, tools=c.tools, enable_thinking=c.thought is not None)) for c in cases]
    right: dict[str, list[bool]] = {skill: [] for skill in skills}
    for group in grouped(asked):
        prompts = [prompt for _, prompt in group]
        answers = generate_batch(model, processor, prompts, max_tokens=MAX_TOKENS, sampling=Sampling(temperature=0.0))
        for (case, _), answer in zip(group, answers, strict=True):
            right[case.skill].append(case.is_right(answer.text))
    yield from ((skill, "", sum(values) / len(values)) for skill, values in right.items())


def score_files(command: CommandLine, skills: list[str], per_skill: int) -> Shares:
    for skill in skills:
        cases = [*held_out_set({skill: PICTURE_SKILLS[skill]}, per_skill)]
        for file in file_kinds(cases[0]):
            right = 0
            for case in cases:
                with tempfile.TemporaryDirectory() as folder:
                    asked = write_files(case, file, Path(folder), "shown")
                    answer = command.ask(asked.question, asked.media, think=case.thought is not None)
                right += case.is_right(answer.content)
            yield skill, file, right / len(cases)


def reference_shares() -> dict[tuple[str, str], float]:
    stored = json.loads((CURRICULUM / "accuracy.json").read_text())
    shares = {(skill, ""): share for skill, share in stored["accuracy"].items()}
    return shares | {(skill, file): share for skill, by in stored["files"].items() for file, share in by.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder (default: the demo)")
    parser.add_argument("--per-skill", type=int, default=200, help="questions for each skill and kind of file")
    parser.add_argument("--skills", nargs="+", choices=[*SKILLS], default=[*SKILLS])
    parser.add_argument("--processes", action="store_true", help="start the command for each question about files")
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    start = time.time()
    reference = reference_shares() if args.model is None else {}
    texts, files = ([s for s in args.skills if s in skills] for skills in (TEXT_SKILLS, PICTURE_SKILLS))
    found, apart = {}, []
    print(f"{'skill':<12} {'file':<5} {'ours':>7} {'reference':>10}")
    for shares in (
        score_texts(args.model, texts, args.per_skill),
        score_files(CommandLine(args.model, args.processes, MAX_TOKENS), files, args.per_skill),
    ):
        for skill, file, share in shares:
            found[f"{skill} {file}".strip()] = share
            theirs = reference.get((skill, file))
            beside = "-" if theirs is None else f"{100 * theirs:.1f}%"
            print(f"{skill:<12} {file:<5} {100 * share:>6.1f}% {beside:>10}", flush=True)
            if theirs is not None:
                apart.append(abs(share - theirs))
    if apart:
        within = sum(difference <= BAR + 1e-9 for difference in apart)
        print(f"within {100 * BAR:.0f} point: {within} of {len(apart)}; furthest apart: {100 * max(apart):.1f} points")
    result = {"per_skill": args.per_skill, "accuracy": found, "seconds": round(time.time() - start)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
