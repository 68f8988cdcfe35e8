"""One model on several ranks: who has which part, and how each loads its own.

Knows the order of things: the ranks meet, say what they have, get a plan, load. What a plan has to know is
portions.py's; how it is made, how ranks meet and what they tell each other is parallel/'s.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from platform import node
from typing import Any

import mlx.core as mx

from mlx_qwen35 import __version__
from mlx_qwen35.checkpoint.adapters import Adapter, put_on, read_adapter
from mlx_qwen35.checkpoint.companions import small_files
from mlx_qwen35.checkpoint.load import compute_dtype, read_config
from mlx_qwen35.checkpoint.load import load_model as read_model
from mlx_qwen35.checkpoint.source import Source, open_source
from mlx_qwen35.errors import ArgumentError, CheckpointError
from mlx_qwen35.experts.budget import StreamPlan
from mlx_qwen35.library.drafting import drafting_bytes, load_head
from mlx_qwen35.library.kernel_check import check_kernels
from mlx_qwen35.library.memory import memory_size
from mlx_qwen35.library.portions import CONTEXT, Options, check_count, held, options_of, sizes_of
from mlx_qwen35.machine.gpu import gpu_info
from mlx_qwen35.machine.system import cache_folder, processor_name
from mlx_qwen35.parallel import meeting, place
from mlx_qwen35.parallel.adapted import adapter_identity
from mlx_qwen35.parallel.early import PATIENCE, Watcher, come_early
from mlx_qwen35.parallel.follower import Follower
from mlx_qwen35.parallel.group import Group
from mlx_qwen35.parallel.identity import identity
from mlx_qwen35.parallel.leader import LeaderModel
from mlx_qwen35.parallel.model import RanksModel
from mlx_qwen35.parallel.plan import Host, Link, Plan, choose
from mlx_qwen35.parallel.progress import READS
from mlx_qwen35.parallel.ranks import Ranks
from mlx_qwen35.parallel.share import RankShare
from mlx_qwen35.processor import Processor

_COMPARED = ("mlx", "mlx-qwen35", "checkpoint", "adapter", "options")
# Rank 0 sees it before anything heavy is imported.
_FOLLOW = """
import sys
from mlx_qwen35.parallel.early import come_early
wire = come_early()
from mlx_qwen35.library.ranked import main
sys.exit(main(wire))
"""


@dataclass(frozen=True)
class _Reading:
    """What is a rank's own, and need not be the same on each: where things lie on its disk, its memory, what drafts."""

    folder: Path
    memory: int | str | None
    adapter_path: str | Path | None
    warm_start: bool
    beside: Callable[[int], int] | None = None

    @cached_property
    def adapter(self) -> Adapter | None:
        """Raises CheckpointError."""
        return None if self.adapter_path is None else read_adapter(self.adapter_path)


def load_ranked(
    folder: Path,
    count: int,
    plan: str | None,
    *,
    memory: int | str | None = None,
    mtp: bool = False,
    adapter_path: str | Path | None = None,
    warm_start: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
    **chosen: Any,
) -> tuple[LeaderModel, Processor]:
    """What `load` returns of a checkpoint on `count` ranks; on the others it ends the process when rank 0 ends.

    chosen: arguments of `options_of`.
    """
    options = options_of(plan=plan, **chosen)
    how = {"memory": memory, "adapter_path": adapter_path, "warm_start": warm_start}
    where = place.place_of()
    if where is not None and where.rank:
        sys.exit(follow(folder, options, **how))
    beside = drafting_bytes(folder, mtp, None, chosen["dtype"])
    model = load_leader(folder, count, options, beside=beside, on_progress=on_progress, **how)
    try:
        if mtp:
            model.take_mtp(load_head(folder, model, dtype=chosen["dtype"], on_progress=on_progress))
        config = read_config(folder, model.context_length, yarn=options.yarn)
        return model, Processor.from_folder(small_files(folder), config)
    except BaseException:
        model.unload()
        raise


def load_leader(
    folder: Path,
    count: int,
    options: Options,
    *,
    memory: int | str | None = None,
    adapter_path: str | Path | None = None,
    beside: Callable[[int], int] | None = None,
    warm_start: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> LeaderModel:
    """Rank 0's share of the model on `count` ranks; the others have theirs on return. They were started with
    `mlx.launch`, or are started here, as processes of this machine.

    memory: for each rank as `load` has it, here shared by all that are started here. beside: tokens of context -> bytes
    that rank 0 is to leave for what drafts. Raises what `load` raises, with the words of whichever rank it is,
    ArgumentError where ranks do not fit together, and RankLostError.
    """
    where = place.place_of()
    if where is not None and where.ranks != count:
        raise ArgumentError(f"ranks is {count}, but {where.ranks} were launched")
    ranks, launched = Ranks(count), where is not None
    if not launched:
        check_count(read_config(folder), count, options.plan)  # before so many processes are started
    with tempfile.TemporaryDirectory() as made:
        environments = [] if launched else place.on_this_machine(count, Path(made))
        where = where or place.place_of(environments[0])
        door = meeting.Door(where, ranks)
        try:
            if not launched:
                memory = memory_size(memory)[0] // count
                told = {"folder": str(folder), "memory": memory, "warm_start": warm_start, "options": asdict(options)}
                told["adapter_path"] = None if adapter_path is None else str(adapter_path)
                ranks.children = {rank: _start(environments[rank], told) for rank in range(1, count)}
                os.environ.update(environments[0])
            how = _Reading(folder, memory, adapter_path, warm_start, beside)
            return _lead(where, ranks, options, how, on_progress)
        except BaseException:
            ranks.end_children()
            raise
        finally:
            door.close()
            if not launched:
                for name in (place.RANK, place.HOSTFILE, place.MEETING):
                    os.environ.pop(name, None)


def _lead(
    where: place.Place,
    ranks: Ranks,
    options: Options,
    how: _Reading,
    on_progress: Callable[[int, int], None] | None,
) -> LeaderModel:
    try:
        with ranks.progress.working(READS):
            source = _source(how.folder, options)
            own = _facts(source, options, how)
        ranks.wait_for_all(meeting.HERE if ranks.children else PATIENCE)
        facts = [own, *ranks.answers()]
        ranks.names = [meeting.name_of(rank, each) for rank, each in enumerate(facts)]
        if problem := meeting.differences(facts, _COMPARED):
            ranks.fail(problem)
            raise ArgumentError(problem)
        ranks.tell(welcome=True)
        with ranks.together():
            group = meeting.join(where, ranks.progress)
            link = measured(group, source.config.text.hidden_size)
        group.alike = len({each["chip"] for each in facts}) == 1
        sizes = sizes_of(source.config, source.specs, compute_dtype(options.dtype).size, options, group.size, source)
        if how.beside is not None:
            sizes = replace(sizes, beside=sizes.beside + how.beside(options.context_length or CONTEXT))
        plan = choose(sizes, [Host(each["memory"]) for each in facts], link, options.plan)
        ranks.tell(plan=[plan.kind, plan.shares], alike=group.alike)
        tokens, stream = held(source, options, plan, 0, own["memory"], how.memory is not None, how.beside)
        held_there = ranks.answers()
        contexts = [tokens, *(each["context"] for each in held_there)]
        given = [each for each in contexts if each is not None]
        steps = _fewest([_steps(stream), *(each["steps"] for each in held_there)])
        ranks.tell(steps=steps)
        options = replace(options, context_length=min(given, default=options.context_length))
        share = RankShare(source.config, plan, group, LeaderModel)

        def read(done: int, total: int) -> None:
            ranks.progress.step()
            ranks.check()
            if on_progress is not None:
                on_progress(done, total)

        with ranks.progress.working(READS):
            model = _read(how, options, share, stream, steps, read)
        ranks.answers()  # loaded
    except BaseException as error:
        ranks.failed_here(error)
        raise
    whose = {name: own[name] for name in ("checkpoint", "adapter") if own[name] is not None}
    model.lead(ranks, plan, options.context_length, whose)
    return model


def follow(
    folder: Path,
    options: Options,
    *,
    memory: int | str | None = None,
    adapter_path: str | Path | None = None,
    warm_start: bool = True,
    follower: Follower | None = None,
) -> int:
    """Another rank than 0: loads its share and does what rank 0 says, until that ends. -> 0.

    What goes wrong ends the process, with 70 and the reason.
    follower: where rank 0 was met already.
    """
    where = place.place_of()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to all of a group; rank 0 decides
    follower = follower or Follower(come_early(), where.rank)
    progress, how = follower.progress, _Reading(folder, memory, adapter_path, warm_start)
    try:
        with progress.working(READS):
            source = _source(folder, options)
            facts = _facts(source, options, how)
        follower.tell(**facts)
        follower.told("welcome")
        with progress.working(READS):
            group = meeting.join(where, progress)
            measured(group, source.config.text.hidden_size)
        told = follower.told("plan")
        group.alike = told["alike"]
        kind, shares = told["plan"]
        plan = Plan(kind, tuple(tuple(share) for share in shares), (), (), 0.0)
        size = memory_size(memory)[0]
        tokens, stream = held(source, options, plan, where.rank, size, memory is not None)
        follower.tell(context=tokens, steps=_steps(stream))
        steps = follower.told("steps")["steps"]
        with progress.working(READS):
            model = _read(how, options, RankShare(source.config, plan, group), stream, steps, progress.step)
        follower.tell(loaded=True)
    except SystemExit:
        raise
    except BaseException as error:
        follower.failed(error)
    follower.follow(model)
    return 0


def main(watcher: Watcher) -> int:
    """The program of ranks that `load_leader` starts, once they have met it."""
    told = json.loads(sys.argv[1])
    options = Options(**told["options"])
    mx.set_default_device(mx.gpu if options.device == "gpu" else mx.cpu)
    follower = Follower(watcher, place.place_of().rank)
    how = {name: told[name] for name in ("memory", "adapter_path", "warm_start")}
    return follow(Path(told["folder"]), options, **how, follower=follower)


def _start(environment: Mapping[str, str], told: Mapping[str, Any]) -> subprocess.Popen[bytes]:
    package = str(Path(__file__).resolve().parents[2])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-c", _FOLLOW, json.dumps(told)],
        env={**os.environ, **environment, "PYTHONPATH": paths},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # a terminal's Ctrl-C is rank 0's business
    )


def _source(folder: Path, options: Options) -> Source:
    return open_source(folder, read_config(folder, options.context_length, yarn=options.yarn))


def _facts(source: Source, options: Options, how: _Reading) -> dict[str, Any]:
    return {
        "mlx": version("mlx"),
        "mlx-qwen35": __version__,
        "checkpoint": identity(source),
        "adapter": None if how.adapter is None else adapter_identity(how.adapter),
        "options": json.loads(json.dumps(asdict(options))),
        "memory": memory_size(how.memory)[0],
        "chip": str(gpu_info().get("device_name") or gpu_info().get("architecture") or processor_name()),
        "host": node(),
        "process": os.getpid(),
    }


def measured(group: Group, hidden: int) -> Link:
    """The link between the ranks: what a small sum takes, and what one of 256 KiB does."""
    small, large = group.latency(4 * (hidden + 1)), group.latency(1 << 18)
    steps = max(1, group.size - 1)
    bandwidth = 2 * steps / group.size * (1 << 18) / max(large - small, 1e-6)
    return Link("the measured link", small / steps, bandwidth)


def _steps(stream: StreamPlan | None) -> tuple[int, int] | None:
    """As RanksModel.go_in_steps takes them; None where all is in memory."""
    return None if stream is None else (stream.chunk, stream.tile)


def _fewest(steps: Sequence[Sequence[int] | None]) -> tuple[int, int] | None:
    """Those that all ranks have room for."""
    given = [each for each in steps if each is not None]
    return (min(chunk for chunk, _ in given), min(tile for _, tile in given)) if given else None


def _read(
    how: _Reading,
    options: Options,
    share: RankShare,
    stream: StreamPlan | None,
    steps: Sequence[int] | None,
    on_progress: Callable[[int, int], None],
) -> Any:
    adapter = None if how.adapter is None else share.adapter(how.adapter)
    model = read_model(
        how.folder,
        dtype=options.dtype,
        context_length=options.context_length,
        yarn=options.yarn,
        kv_form=options.kv_form,
        stream=stream,
        hot_lists=cache_folder() / "hot-experts" if how.warm_start else None,
        share=share,
        on_progress=on_progress,
    )
    if not isinstance(model, RanksModel):
        raise CheckpointError("this is no share of a model")
    if adapter is not None:
        put_on(model, adapter)
    if steps is not None:
        model.go_in_steps(*steps)
    if options.exact:
        model.be_exact()
    model.kernels = options.kernels
    check_kernels(model, wanted=options.kernels)
    return model
