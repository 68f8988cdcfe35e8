"""The demo checkpoint asked about picture and video files through the command line, as the reference was.

Knows answers.json, where tools/train_demo/evaluate.py wrote what transformers says to the same files. Needs no torch.
"""

import hashlib
import json
from pathlib import Path

import pytest

from benchmarks.command_line import CommandLine
from mlx_qwen35.library import demo_folder
from tests.soak import examples

ANSWERS = json.loads((Path(__file__).parent / "answers.json").read_text())
KINDS = sorted({(answer["skill"], answer["file"]) for answer in ANSWERS["answers"]})


def test_the_answers_are_those_of_these_weights() -> None:
    weights = hashlib.sha256((demo_folder() / "model.safetensors").read_bytes()).hexdigest()
    assert ANSWERS["weights"] == weights, "run tools/train_demo/evaluate.py: the weights have changed"


def test_every_skill_and_kind_of_file_is_asked() -> None:
    pictures = {(skill, file) for skill in ("what", "where", "count", "differ") for file in ("png", "jpeg")}
    assert {*KINDS} == pictures | {("video", "mp4")}
    assert min(sum((a["skill"], a["file"]) == kind for a in ANSWERS["answers"]) for kind in KINDS) >= 4


@pytest.mark.parametrize("skill, file", KINDS)
def test_answers(curriculum, skill: str, file: str, tmp_path: Path) -> None:
    """Reasoning and answer, right or wrong."""
    if file == "mp4":
        pytest.importorskip("av", reason="PyAV is not installed (extra 'video'): video files cannot be made or read")
    stored = [a for a in ANSWERS["answers"] if (a["skill"], a["file"]) == (skill, file)]
    stored = stored[: examples(len(stored), 2, least=2)]
    most = max(answer["number"] for answer in stored) + 1
    cases = [*curriculum.held_out_set({skill: curriculum.PICTURE_SKILLS[skill]}, most)]
    for answer in stored:
        case = cases[answer["number"]]
        asked = curriculum.write_files(case, file, tmp_path, str(answer["number"]))
        said = CommandLine().ask(asked.question, asked.media, think=case.thought is not None)
        *reasoning, content = answer["says"].split("</think>")
        assert (said.reasoning.strip(), said.content.strip()) == ("".join(reasoning).strip(), content.strip())
