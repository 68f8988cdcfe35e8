"""Rank 0 of a test in which a rank is lost: loads, reads prompts, answers and saves, until something ends it.

`python -m tests.parallel.victim RANKS PLAN FOLDER SILENCE`; prints each rank's process, then each thing that it does,
and every token. Ends with 70 and the reason where it learns that a rank is lost.
"""

import itertools
import sys
from pathlib import Path

import mlx.core as mx

mx.set_default_device(mx.cpu)

from mlx_qwen35 import Sampling, load  # noqa: E402
from mlx_qwen35.errors import RankLostError  # noqa: E402
from mlx_qwen35.generation import stream_generate  # noqa: E402
from mlx_qwen35.library import ranked  # noqa: E402
from mlx_qwen35.parallel import wire  # noqa: E402
from mlx_qwen35.session import Session, load_session  # noqa: E402


def say(*words: object) -> None:
    print(*words, flush=True)


def main(count: int, plan: str, folder: Path) -> int:
    start = ranked._start

    def started(environment, told):
        child = start(environment, told)
        say("rank", environment["MLX_RANK"], child.pid)
        return child

    ranked._start = started
    say("load")
    model, processor = load(ranks=count, plan=plan, memory="2GB", warm_start=False)
    path = folder / "lost.session"
    try:
        for number in itertools.count(17):
            session = load_session(path, model, processor) if path.exists() else Session(model, processor)
            say("prompt")
            for part in stream_generate(
                model, processor, f"What is {number % 50} + 25?", session=session, max_tokens=12,
                sampling=Sampling(temperature=0),
            ):  # fmt: skip
                say("token", number % 50, part.token)
            say("save")
            session.save(path)
            session.forget()
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 70
    return 0


if __name__ == "__main__":
    count, plan, folder, silence = sys.argv[1:]
    wire.SILENCE = float(silence)
    try:
        status = main(int(count), plan, Path(folder))
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        status = 70
    sys.exit(status)
