"""Rank 0 of a test in which a rank hangs and lives: a thread of ours that sleeps for ever inside of a layer.

`python -m tests.parallel.hanging RANKS PLAN VICTIM CALL SECONDS`: at the CALL-th time that rank VICTIM comes to a layer
of its own; SECONDS that a rank may stand. Prints each rank's process, and every token. Ends as victim.py does.
"""

import sys
import threading
from typing import Any

import mlx.core as mx

from mlx_qwen35 import Sampling, load
from mlx_qwen35.errors import RankLostError
from mlx_qwen35.generation import stream_generate
from mlx_qwen35.library import ranked
from mlx_qwen35.model.decoder import DecoderLayer
from mlx_qwen35.parallel import progress

_FOLLOW = """
import sys
from mlx_qwen35.parallel.early import come_early
wire = come_early()
from tests.parallel.hanging import hang
hang({call}, {seconds})
from mlx_qwen35.library.ranked import main
sys.exit(main(wire))
"""


def hang(call: int | None, seconds: float) -> None:
    """Sleep for ever where this process comes to a layer for the `call`-th time; None: it never does."""
    progress.STANDS = seconds
    if call is None:
        return
    mix, count = DecoderLayer._mixed, iter(range(1, sys.maxsize))

    def mixed(layer: DecoderLayer, *inputs: Any) -> Any:
        if next(count) == call:
            print("hangs", file=sys.stderr, flush=True)
            threading.Event().wait()
        return mix(layer, *inputs)

    DecoderLayer._mixed = mixed


def main(count: int, plan: str, victim: int, call: int, seconds: float) -> int:
    start = ranked._start

    def started(environment: dict[str, str], told: dict[str, Any]) -> Any:
        rank = int(environment["MLX_RANK"])
        ranked._FOLLOW = _FOLLOW.format(call=call if rank == victim else None, seconds=seconds)
        child = start(environment, told)
        print("rank", rank, child.pid, flush=True)
        return child

    ranked._start = started
    hang(call if victim == 0 else None, seconds)
    try:
        model, processor = load(ranks=count, plan=plan, memory="2GB", warm_start=False)
        for part in stream_generate(model, processor, "What is 17 + 25?", max_tokens=40,
                                    sampling=Sampling(temperature=0)):  # fmt: skip
            print("token", part.token, flush=True)
    except RankLostError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 70
    return 0


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    count, plan, victim, call, seconds = sys.argv[1:]
    sys.exit(main(int(count), plan, int(victim), int(call), float(seconds)))
