"""A program that converts again and again, each time in a process that SIGKILL ends at a given moment.

    python killed.py '{"source": .., "options": {..}, "runs": [[TARGET, MOMENT], ..]}'

A moment is a number of calls of the operating system that change or open files: the process dies instead of the next
one, or halfway through it if it writes; null lets it live. Prints for each run what was left, as a JSON list.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.rmtree")


def die_at(moment: int | None) -> Callable[[], int]:
    """Returns a function that says how many calls there have been."""
    calls = 0

    def step() -> bool:
        nonlocal calls
        calls += 1
        return moment is not None and calls > moment

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in EVENTS and step():
            os.kill(os.getpid(), signal.SIGKILL)

    def halfway(call: Callable[..., int]) -> Callable[..., int]:
        def write(handle: int, data: Any, *place: int) -> int:
            if step():
                call(handle, memoryview(data)[: len(data) // 2], *place)
                os.kill(os.getpid(), signal.SIGKILL)
            return call(handle, data, *place)

        return write

    os.pwrite, os.write = halfway(os.pwrite), halfway(os.write)
    sys.addaudithook(hook)
    return lambda: calls


def run(job: dict[str, Any], target: Path, moment: int | None) -> dict[str, Any]:
    """One conversion, and what it left."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        write, calls = os.write, die_at(moment)
        try:
            convert(job["source"], target, **job["options"])
            write(writer, str(calls()).encode())
            os._exit(0)
        except CheckpointError as error:
            print(error, file=sys.stderr)
            os._exit(1)
    os.close(writer)
    with open(reader) as file:
        calls = file.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return state(target) | {"status": status, "calls": int(calls or 0)}


def takes(folder: Path) -> bool:
    try:
        open_source(folder)
        return True
    except CheckpointError:
        return False


def state(target: Path) -> dict[str, Any]:
    """Whether target and hidden folder are there, and whether a loader takes them for a checkpoint."""
    hidden = container_of(target)
    return {
        "target": target.exists(),
        "loads": takes(target),
        "hidden": hidden.exists(),
        "hidden_loads": takes(hidden / "folder") or takes(hidden),
        "others": sorted(path.name for path in target.parent.iterdir()),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from mlx_qwen35.checkpoint import pipeline, task
    from mlx_qwen35.checkpoint.convert import convert
    from mlx_qwen35.checkpoint.partial import container_of
    from mlx_qwen35.checkpoint.source import open_source
    from mlx_qwen35.checkpoint.write import SafetensorsFile
    from mlx_qwen35.errors import CheckpointError

    SafetensorsFile.sync = lambda self: None  # a busy disk takes seconds for it
    task.PIECE_BYTES = 20_000
    pipeline.workers = lambda: 2
    wanted = json.loads(sys.argv[1])
    print(json.dumps([run(wanted, Path(target), moment) for target, moment in wanted["runs"]]))
