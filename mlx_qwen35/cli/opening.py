"""What the flags of generate and chat name, opened: the checkpoint, its processor and model, who drafts, the session.

Knows flags by their names, and which of them make no sense together. Imports what loads only when asked to.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlx_qwen35.cli import ranks
from mlx_qwen35.cli.demo import DEMO_HINT
from mlx_qwen35.cli.options import OptionError, check_sampling, progress_of
from mlx_qwen35.cli.progress import Progress
from mlx_qwen35.errors import Qwen35Error
from mlx_qwen35.text.screen import note

if TYPE_CHECKING:
    from mlx_qwen35.library import Held
    from mlx_qwen35.library.hub import Offer
    from mlx_qwen35.model import Model
    from mlx_qwen35.processor import Processor
    from mlx_qwen35.session import Session

    CheckOffer = Callable[[argparse.Namespace, Offer], None]


def hold(args: argparse.Namespace, check: CheckOffer | None = None) -> Held:
    """The checkpoint that the flags name, and how it will be held in memory; says so where it is the demo or streamed.

    Refuses flags that make no sense, and before a download all that can be refused by then; check: as in `find_model`.
    """
    check_sampling(args)
    if args.context_length is not None and args.context_length < 2:
        raise OptionError(f"--context-length is {args.context_length}; it must be 2 or more")
    if args.mtp and args.draft_model is not None:
        raise OptionError("--mtp and --draft-model: only one can draft; leave one out")
    if args.exact and args.adapter_path is not None:
        raise OptionError("--exact does not hold for an adapter beside the weights: merge it first, or leave one out")
    if args.num_draft_tokens is not None:
        _check_draft_tokens(args)
    if args.kv_bits is None and (args.kv_group_size, args.quantized_kv_start) != (64, 0):
        raise OptionError("--kv-group-size and --quantized-kv-start say how --kv-bits is done: add --kv-bits 4 or 8")
    if args.model is None:
        note(f"No --model: this is the demo, a tiny model inside the package. {DEMO_HINT}")
    try:
        held = _held(args, find_model(args, check))
    except ValueError as error:
        raise error if isinstance(error, Qwen35Error) else OptionError(str(error)) from error
    if held.yarn:
        print(
            f"YaRN stretches positions, for up to {held.context_length:,} tokens. It changes all answers, those to "
            "short prompts a little for the worse: leave it out where the model's own context does.",
            file=sys.stderr,
        )
    if held.stream is not None:
        print(held, file=sys.stderr)
    return held


def _check_draft_tokens(args: argparse.Namespace) -> None:
    if not args.mtp and args.draft_model is None:
        raise OptionError("--num-draft-tokens, but nothing drafts: add --mtp or --draft-model NAME, or leave it out")
    from mlx_qwen35.library.drafting import block_rows
    from mlx_qwen35.speculative.pace import MOST

    rows = None if args.draft_model is None else block_rows(args.draft_model)
    most = MOST if rows is None else rows - 1
    if not 1 <= args.num_draft_tokens <= most:
        raise OptionError(f"--num-draft-tokens is {args.num_draft_tokens}; it must be 1 to {most}")


def find_model(args: argparse.Namespace, check: CheckOffer | None = None) -> Path:
    """The folder of the checkpoint that the flags name; what is downloaded is checked against the flags before.

    check: called with the flags and what is to be downloaded; what it raises ends that.
    """
    from mlx_qwen35 import library
    from mlx_qwen35.checkpoint.adapters import read_adapter
    from mlx_qwen35.library.memory import memory_size

    memory_size(args.memory)
    chosen = chosen_of(args)
    adapter = None if args.adapter_path is None else read_adapter(args.adapter_path)

    def check_all(offer: Offer) -> None:
        from mlx_qwen35.library.beforehand import check_offer

        check_offer(offer, args.memory, **chosen, mtp=args.mtp, draft_model=args.draft_model, adapter=adapter)
        if check is not None:
            check(args, offer)

    return library.find(args.model, on_progress=Progress("Downloading", "bytes"), check=check_all)


def _held(args: argparse.Namespace, folder: Path) -> Held:
    from mlx_qwen35 import library

    chosen = chosen_of(args)

    def held(**more: Any) -> Held:
        if ranks.count_of(args) > 1:  # each decides that of its share
            return library.Held(folder, args.dtype, args.context_length, None, False, args.yarn, chosen["kv_form"])
        return library.hold(folder, args.memory, **chosen, **more)

    if not args.mtp and args.draft_model is None:
        return held()
    from mlx_qwen35.library.drafting import drafting_bytes
    from mlx_qwen35.library.finding import HubName, look_up
    from mlx_qwen35.library.hub import complete_head

    if args.mtp:
        complete_head(folder, Progress("Downloading", "bytes"))
    found = held(beside=drafting_bytes(folder, args.mtp, args.draft_model, args.dtype))
    if args.draft_model is None or not isinstance(look_up(args.draft_model), HubName):
        return found
    library.find(args.draft_model, on_progress=Progress("Downloading", "bytes"))
    return _held(args, folder)  # by its files now


def chosen_of(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `hold`."""
    from mlx_qwen35.cache.kv import KVFormat

    form = None if args.kv_bits is None else KVFormat(args.kv_bits, args.kv_group_size, args.quantized_kv_start)
    return {"dtype": args.dtype, "context_length": args.context_length, "yarn": args.yarn, "kv_form": form}


def load_processor(args: argparse.Namespace, held: Held) -> Processor:
    """What reads prompts, with the context that the memory allows, and ends answers at the flags' tokens too."""
    from mlx_qwen35 import library

    processor = library.load_processor(held.folder, context_length=held.context_length, yarn=held.yarn)
    for token in args.extra_eos_token:
        number = processor.tokenizer.token_id(token)
        if number is None:
            raise OptionError(f"--extra-eos-token: {token!r} is no token of this checkpoint; --stop takes any text")
        processor.eos_token_ids |= {number}
    return processor


def load_model(args: argparse.Namespace, held: Held) -> Model:
    """The model that goes with it: its weights are read only now, when prompts and pictures have been."""
    from mlx_qwen35 import library
    from mlx_qwen35.checkpoint.adapters import check_loadable, load_adapter, read_adapter
    from mlx_qwen35.checkpoint.load import read_config

    progress = progress_of(args, "Loading", "bytes")
    if (count := ranks.count_of(args)) > 1:
        return _load_ranked(args, held, count, progress)
    adapter = None if args.adapter_path is None else read_adapter(args.adapter_path)
    if adapter is not None:
        check_loadable(adapter, read_config(held.folder))
    how = {"exact": args.exact, "kernels": args.kernels, "warm_start": args.warm_start}
    model = library.load_held(held, **how, on_progress=progress)
    if args.mtp:
        from mlx_qwen35.library.drafting import load_head

        model.take_mtp(load_head(held.folder, model, dtype=args.dtype, on_progress=progress))
    return model if adapter is None else load_adapter(model, adapter)


def _load_ranked(
    args: argparse.Namespace, held: Held, count: int, progress: Callable[[int, int], None] | None
) -> Model:
    """Rank 0's, when all have theirs."""
    from mlx_qwen35.library.drafting import drafting_bytes, load_head
    from mlx_qwen35.library.ranked import load_leader

    how = {"memory": args.memory, "adapter_path": args.adapter_path, "warm_start": args.warm_start}
    how |= {"beside": drafting_bytes(held.folder, args.mtp, args.draft_model, args.dtype), "on_progress": progress}
    model = load_leader(held.folder, count, ranks.options_of(args, chosen_of(args)), **how)
    if args.verbose:
        ranks.tell_plan(model)
    if args.mtp:
        model.take_mtp(load_head(held.folder, model, dtype=args.dtype, on_progress=progress))
    return model


def bound_to(processor: Processor, model: Model) -> None:
    """Prompts are no longer than what the ranks of a model have room for."""
    most = getattr(model, "context_length", None)
    if most is not None:
        processor.context_length = min(processor.context_length, most)


def follows(args: argparse.Namespace) -> int | None:
    """As ranks.follows."""
    return ranks.follows(args, lambda: find_model(args), chosen_of(args))


@contextmanager
def locked_session(args: argparse.Namespace) -> Iterator[None]:
    """Inside, the session file that the flags name is this program's. Raises WriteError where none can be written, now
    and not when there is something to lose, and SessionError where another program has it."""
    if args.session is None:
        yield
        return
    from mlx_qwen35.session.file import check_place, read_description
    from mlx_qwen35.session.lock import SessionLock

    check_place(Path(args.session))
    with SessionLock(args.session):
        if os.path.exists(args.session):
            read_description(Path(args.session))  # what is no session is told before anything is loaded
        yield


def open_session(args: argparse.Namespace, model: Model, processor: Processor) -> Session | None:
    """The one in the file that the flags name, a new one where there is no file, None where no file is named."""
    if args.session is None:
        return None
    from mlx_qwen35.session import Session, load_session

    if not os.path.exists(args.session):
        return Session(model, processor)
    session = load_session(args.session, model, processor)
    said = len((session.notes or {}).get("exchanges", []))
    print(going_on(args.session, said, len(session.tokens)), file=sys.stderr)
    return session


def going_on(path: str, questions: int, computed: int) -> str:
    """What is said where a session goes on: how many questions were asked, how many tokens need not be computed."""
    asked = f"{questions} question{'s' if questions != 1 else ''}, " if questions else ""
    return f"Going on with {path}: {asked}{computed:,} tokens are computed."


def draft_options(args: argparse.Namespace, model: Model) -> dict[str, Any]:
    """The arguments of `stream_generate` that say who drafts, and how many tokens."""
    chosen: dict[str, Any] = {"num_draft_tokens": args.num_draft_tokens, "lookup": args.lookup}
    if args.draft_model is not None:
        from mlx_qwen35.library.drafting import load_draft_model

        progress = progress_of(args, "Loading", "bytes")
        chosen["draft_model"] = load_draft_model(args.draft_model, model, dtype=args.dtype, on_progress=progress)
    return chosen
