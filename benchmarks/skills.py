"""How many held-out questions a checkpoint answers right, skill by skill, run by this package.

    python benchmarks/skills.py [--model FOLDER] [--per-skill 200] [--skills arithmetic recall ...] [--json FILE]

The questions are those of the demo's curriculum (tools/train_demo), the same on every machine and never trained on. For
the demo the reference's accuracy (tools/train_demo/accuracy.json, measured with transformers) is printed beside.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CURRICULUM = ROOT / "tools" / "train_demo"
sys.path[:0] = [str(ROOT), str(CURRICULUM)]

from case import Case, held_out_set  # noqa: E402
from text_skills import TEXT_SKILLS  # noqa: E402

from mlx_qwen35 import Sampling, load  # noqa: E402
from mlx_qwen35.generation import generate_batch  # noqa: E402

MAX_TOKENS = 160


def grouped(model_prompts: list[tuple[Case, object]], most: int = 32) -> list[list[tuple[Case, object]]]:
    """Cases with prompts of like length, so that little is padded."""
    ordered = sorted(model_prompts, key=lambda pair: len(pair[1].tokens))
    return [ordered[i : i + most] for i in range(0, len(ordered), most)]


def score(folder: str | None, skills: list[str], per_skill: int) -> dict[str, float]:
    """-> the share of right answers by skill, greedy."""
    model, processor = load(folder)
    cases = held_out_set({skill: TEXT_SKILLS[skill] for skill in skills}, per_skill)
    asked = [(c, processor.prompt(c.messages, tools=c.tools, enable_thinking=c.thought is not None)) for c in cases]
    right: dict[str, list[bool]] = {skill: [] for skill in skills}
    for group in grouped(asked):
        prompts = [prompt for _, prompt in group]
        answers = generate_batch(model, processor, prompts, max_tokens=MAX_TOKENS, sampling=Sampling(temperature=0.0))
        for (case, _), answer in zip(group, answers, strict=True):
            right[case.skill].append(case.is_right(answer.text))
    return {skill: sum(values) / len(values) for skill, values in right.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint folder (default: the demo)")
    parser.add_argument("--per-skill", type=int, default=200, help="questions for each skill")
    parser.add_argument("--skills", nargs="+", choices=[*TEXT_SKILLS], default=[*TEXT_SKILLS])
    parser.add_argument("--json", type=Path, help="also write the result here")
    args = parser.parse_args()
    start = time.time()
    accuracy = score(args.model, args.skills, args.per_skill)
    reference = {}
    if args.model is None and (CURRICULUM / "accuracy.json").exists():
        reference = json.loads((CURRICULUM / "accuracy.json").read_text())["accuracy"]
    print(f"{'skill':<12} {'ours':>7} {'reference':>10}")
    for skill, share in accuracy.items():
        theirs = f"{100 * reference[skill]:>9.1f}%" if skill in reference else f"{'-':>10}"
        print(f"{skill:<12} {100 * share:>6.1f}% {theirs}")
    result = {"per_skill": args.per_skill, "accuracy": accuracy, "seconds": round(time.time() - start)}
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
