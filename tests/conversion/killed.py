"""A program that converts again and again, each time in a process that SIGKILL ends at a given moment.

    python killed.py '{"source": .., "options": {..}, "runs": [[TARGET, MOMENT], ..]}'

Each process is a fork; on a Mac, where MLX does not outlive one, it is started anew.

A moment is a number of calls of the operating system that change or open files: the process dies instead of the next
one, or halfway through it if it writes; null lets it live. Prints for each run what was left, as a JSON list.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

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
    calls, status = (anew if is_mac() else forked)(job, target, moment)
    return state(target) | {"status": status, "calls": int(calls or 0)}


def forked(job: dict[str, Any], target: Path, moment: int | None) -> tuple[str, int]:
    """(what the process wrote, its exit status)."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        work(job, target, moment, writer)
    os.close(writer)
    with open(reader) as file:
        calls = file.read()
    return calls, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def anew(job: dict[str, Any], target: Path, moment: int | None) -> tuple[str, int]:
    """The same."""
    command = [sys.executable, __file__, json.dumps({**job, "runs": [], "run": [str(target), moment]})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    return done.stdout, done.returncode


def work(job: dict[str, Any], target: Path, moment: int | None, writer: int) -> NoReturn:
    """Convert, write how many calls there have been, and leave."""
    write, calls = os.write, die_at(moment)
    try:
        convert(job["source"], target, **job["options"])
        write(writer, str(calls()).encode())
        os._exit(0)
    except CheckpointError as error:
        print(error, file=sys.stderr)
        os._exit(1)


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
    import mlx.core as mx

    from mlx_qwen35.checkpoint.source import open_source
    from mlx_qwen35.conversion import journal, pipeline, task, write
    from mlx_qwen35.conversion.convert import convert
    from mlx_qwen35.conversion.partial import container_of
    from mlx_qwen35.errors import CheckpointError
    from mlx_qwen35.machine import files
    from mlx_qwen35.machine.system import is_mac

    mx.set_default_device(mx.cpu)
    for module in (files, journal, write):
        module.flush = lambda handle: None  # a busy disk takes seconds for it
    task.PIECE_BYTES = 20_000
    pipeline.workers = lambda: 2
    wanted = json.loads(sys.argv[1])
    if "run" in wanted:
        target, moment = wanted["run"]
        work(wanted, Path(target), moment, sys.stdout.fileno())
    print(json.dumps([run(wanted, Path(target), moment) for target, moment in wanted["runs"]]))
