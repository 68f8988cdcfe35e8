"""Scores the demo checkpoint with the reference: transformers loads the BF16 files and answers greedily in float32.

    python tools/train_demo/evaluate.py [--per-skill 200] [--model FOLDER]

Every held-out question is asked through transformers' own processing; those about pictures and videos from files (PNG,
JPEG, MP4), videos from their frames as well. Writes, of the demo,
  accuracy.json beside this file: the share of right answers by skill (pictures: PNG, which keeps every level; videos:
    frames) and by kind of file, how evenly the experts are used, how often the prediction head's first draft is what
    greedy decoding says;
  tests/demo/vectors.npz: the logits of a held-out question of each text skill, and of some about pictures and videos;
  tests/demo/answers.json: what it answers to questions about files, where it is sure.
Needs torch, transformers and PyAV.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from case import Case, held_out_set  # noqa: E402
from encode import DEMO  # noqa: E402
from examiner import Examiner, Reply  # noqa: E402
from media_files import file_kinds, write_files  # noqa: E402
from picture_skills import PICTURE_SKILLS  # noqa: E402
from text_skills import TEXT_SKILLS  # noqa: E402

from tests.reference_processor import ReferencePrompt  # noqa: E402

SKILLS = {**TEXT_SKILLS, **PICTURE_SKILLS}

RESULT = Path(__file__).with_name("accuracy.json")
VECTORS = ROOT / "tests" / "demo" / "vectors.npz"
ANSWERS = ROOT / "tests" / "demo" / "answers.json"
SEEN_IN_VECTORS = ("what", "differ", "video")
KEPT = 6  # answers of a skill and a kind of file
SURE = 1.0  # in logits: what another machine's rounding or JPEG decoder does not turn
DRAFTED = 1000  # tokens of a skill


@dataclass(frozen=True)
class Asked:
    """The number-th held-out question of a skill; file: the kind of its files, "" for text, "frames" for a video that
    is none."""

    case: Case
    number: int
    file: str
    prompt: ReferencePrompt


def ask(examiner: Examiner, cases: list[Case], folder: Path) -> list[Asked]:
    """Each question in every form that it has."""
    questions = []
    for number, case in enumerate(cases):
        kinds = file_kinds(case)
        for file in ("frames", *kinds) if case.skill == "video" else kinds or ("",):
            written = file in kinds and write_files(case, file, folder, str(number))
            messages = written.messages if written else case.messages
            prompt = examiner.processor.prompt(messages, tools=case.tools, enable_thinking=case.thought is not None)
            questions.append(Asked(case, number, file, prompt))
    return questions


def drafted(examiner: Examiner, questions: list[Asked], replies: list[Reply]) -> list[bool]:
    found: list[bool] = []
    for question, reply in zip(questions, replies, strict=True):
        if len(found) < DRAFTED and question.file in ("", "frames", "png"):
            found += examiner.drafts(question.prompt, reply.tokens)
    return found


def sure(questions: list[Asked], replies: list[Reply]) -> list[dict[str, Any]]:
    """The first few answers of each kind of file that hang on no rounding."""
    kept: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for question, reply in zip(questions, replies, strict=True):
        file = question.file
        if file not in ("", "frames") and reply.margin >= SURE and len(kept[file]) < KEPT:
            record = {"skill": question.case.skill, "file": file, "number": question.number, "says": reply.text}
            kept[file].append(record)
    return [record for records in kept.values() for record in records]


def vectors(examiner: Examiner) -> dict[str, np.ndarray]:
    """ids_SKILL [T], prompt and right reply of its first held-out question, and logits_SKILL [T, vocab] in float32."""
    out = {}
    for case in held_out_set({k: v for k, v in SKILLS.items() if k in {*TEXT_SKILLS, *SEEN_IN_VECTORS}}, 1):
        prompt = examiner.processor.prompt(case.messages, tools=case.tools, enable_thinking=case.thought is not None)
        out[f"ids_{case.skill}"], out[f"logits_{case.skill}"] = examiner.logits(prompt, case.reply)
    return out


def share(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--per-skill", type=int, default=200)
    args = parser.parse_args()
    start = time.time()
    weights = hashlib.sha256((args.model / "model.safetensors").read_bytes()).hexdigest()
    examiner = Examiner(args.model)
    accuracy, files, accepted, answers = {}, {}, {}, []
    for skill, maker in SKILLS.items():
        with tempfile.TemporaryDirectory() as folder:
            questions = ask(examiner, [*held_out_set({skill: maker}, args.per_skill)], Path(folder))
        replies = examiner.replies([q.prompt for q in questions])
        right: dict[str, list[bool]] = defaultdict(list)
        for question, reply in zip(questions, replies, strict=True):
            right[question.file].append(question.case.is_right(reply.text))
        shares = {file: share(values) for file, values in right.items()}
        accuracy[skill] = next(shares[file] for file in ("", "frames", "png") if file in shares)
        if by_file := {file: value for file, value in shares.items() if file not in ("", "frames")}:
            files[skill] = by_file
        accepted[skill] = share(drafted(examiner, questions, replies))
        answers += sure(questions, replies)
        print(f"{skill:<12} {shares}  {time.time() - start:.0f} s", flush=True)
    result = {
        "per_skill": args.per_skill,
        "accuracy": accuracy,
        "files": files,
        "first_draft_accepted": accepted,
        "expert_use": examiner.expert_use(),
        "seconds": round(time.time() - start),
    }
    print(json.dumps(result, indent=2))
    if args.model == DEMO:
        np.savez_compressed(VECTORS, **vectors(examiner))
        lines = ",\n".join(json.dumps(answer) for answer in answers)
        ANSWERS.write_text(f'{{\n"weights": "{weights}",\n"answers": [\n{lines}\n]\n}}\n')
        RESULT.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
