"""Make prompts.json: what transformers makes of the conversations in conversations.py.

    OMP_NUM_THREADS=1 python tests/golden/vision/make_prompts.py [SHARED]       (needs torch, transformers and av)

Twice: with the files of the demo checkpoint, and with published ones from SHARED, the folder of reference material (the
folder `shared` beside the checkout if left out). Of each conversation are stored its tokens, a run of equal ones as
[token, how many]; of each picture and video the kind, the grid, the times of the frame pairs and, but for video files,
a hash of the levels 0..255 that the pixel values stand for; a hash of the position ids [3, T] as int32; the rope delta.
The placeholders of a video are the released ones, not those of transformers 5.23: tests/reference_processor.py.
"""

import json
import sys
import tempfile
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parents[2]
sys.path.insert(0, str(CHECKOUT))

from tests.golden.vision.conversations import NAMED, Conversation  # noqa: E402
from tests.golden.vision.digests import levels_digest, positions_digest  # noqa: E402
from tests.published import write_published_files  # noqa: E402
from tests.reference_processor import ReferenceProcessor  # noqa: E402


def expected(processor: ReferenceProcessor, conversation: Conversation, folder: Path) -> dict[str, Any]:
    made = processor.prompt(conversation.drawn(folder), **conversation.options)
    positions, delta = made.positions()
    media = []
    for (kind, grid, times, pixels), shown in zip(made.media, conversation.shown, strict=True):
        levels = levels_digest(pixels) if shown.rate is None else None
        media.append([kind, grid, [round(time, 6) for time in times], levels])
    return {
        "tokens": packed(made.tokens),
        "media": media,
        "positions": positions_digest(positions),
        "delta": delta,
    }


def packed(tokens: list[int]) -> list[int | list[int]]:
    runs = [(token, len([*run])) for token, run in groupby(tokens)]
    return [token if count == 1 else [token, count] for token, count in runs]


def main() -> None:
    shared = Path(sys.argv[1]) if len(sys.argv) > 1 else CHECKOUT.parent / "shared"
    lines = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        published = write_published_files(shared / "model_data", folder)
        for which, place in (("demo", CHECKOUT / "mlx_qwen35" / "demo"), ("published", published)):
            processor = ReferenceProcessor(place)
            cases = {name: expected(processor, conversation, folder) for name, conversation in NAMED.items()}
            content = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
            lines.append(f'"{which}": {{\n{content}\n}}')
    made_with = {name: version(name) for name in ("transformers", "torch", "pillow", "av", "numpy")}
    lines.insert(0, f'"made_with": {json.dumps(made_with)}')
    (HERE / "prompts.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
