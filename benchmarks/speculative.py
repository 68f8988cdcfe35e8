"""What drafts bring: whether answers stay the same, how often drafts are right, and how much faster tokens come.

    python benchmarks/speculative.py identical [--tokens 20000] [--only WORD]    # greedy, with and without drafts
    python benchmarks/speculative.py acceptance [--per-skill 20]      # of the demo's head on its held-out questions
    python benchmarks/speculative.py acceptance --session loaded      # the question was read into a session before
    python benchmarks/speculative.py speed [--rounds 5] [--out FILE]  # tokens a second with and without, in turns

identical: the demo (in memory, streamed, in 4 bits) on held-out questions, and random dense and mixture-of-experts
models with a random head and with drafters that are right now and then; 1 to 4 tokens at a time and as many as pay.
acceptance: by place in the round, with a fixed number of drafts; --session: each question was read, with a token of its
answer, into a session that is then kept, branched, or saved and loaded, and answers it. speed: answers to the same
questions, each with and without drafts in turns; experts in memory and streamed with half of them in memory (from the
page cache); the prompt's time is not in it. All on the device that MLX has; figures of the CPU say nothing about Metal.
Prints a table, and for speed JSON lines as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.nn as nn

ROOT = Path(__file__).resolve().parents[1]
CURRICULUM = ROOT / "tools" / "train_demo"
sys.path[:0] = [str(ROOT), str(CURRICULUM)]

from case import held_out_set  # noqa: E402
from picture_skills import PICTURE_SKILLS  # noqa: E402
from text_skills import TEXT_SKILLS  # noqa: E402

from benchmarks.measuring import circumstances, compared, in_turns, spread, write  # noqa: E402
from mlx_qwen35 import Sampling, Session, load, load_session, stream_generate  # noqa: E402
from mlx_qwen35.checkpoint.load import load_model  # noqa: E402
from mlx_qwen35.checkpoint.mtp import load_mtp  # noqa: E402
from mlx_qwen35.experts.budget import StreamPlan  # noqa: E402
from mlx_qwen35.library import demo_folder  # noqa: E402
from mlx_qwen35.speculative.pace import MOST, Pace  # noqa: E402
from tests.drafted import near, with_head  # noqa: E402
from tests.talkers import Endless, random_model  # noqa: E402

GREEDY = Sampling()
LONGEST = 160  # tokens of an answer


def prompts(processor: Any, skills: dict[str, Any], per_skill: int) -> Iterator[tuple[str, Any]]:
    for case in held_out_set(skills, per_skill):
        thinking = case.thought is not None
        yield case.skill, processor.prompt(case.messages, tools=case.tools, enable_thinking=thinking)


def streamed_demo(slots: int) -> Any:
    """The demo with so many of its sixteen experts a layer in memory, and its head."""
    plan = StreamPlan(slots=(slots,) * 8, group=4, chunk=256, tile=256, cache_limit=1 << 26, memory=1 << 32)
    model = load_model(demo_folder(), stream=plan)
    model.take_mtp(load_mtp(demo_folder(), model.config))
    return model


def quantized_demo() -> Any:
    model, _ = load(mtp=True)
    fits = lambda path, m: hasattr(m, "to_quantized") and "vision" not in path and m.weight.shape[-1] % 64 == 0  # noqa: E731
    nn.quantize(model, 64, 4, class_predicate=fits)
    return model


@contextmanager
def fixed(count: int | None) -> Iterator[None]:
    """So many drafts in every round; None: as many as pay."""
    choose = Pace.choose
    if count is not None:
        Pace.choose = lambda self: min(count, self.most)
    try:
        yield
    finally:
        Pace.choose = choose


def answer(model: Any, processor: Any, prompt: Any, count: int | None = None, **options: Any) -> list[Any]:
    options = {"sampling": GREEDY, "max_tokens": LONGEST, "num_draft_tokens": count or MOST} | options
    with fixed(count):
        return list(stream_generate(model, processor, prompt, **options))


def identical(arguments: argparse.Namespace) -> None:
    demo, processor = load(mtp=True)
    asked = list(prompts(processor, {**TEXT_SKILLS, **PICTURE_SKILLS}, 40))
    asked = [asked[n] for n in sorted(range(len(asked)), key=lambda n: n % 40)]  # of all skills in turn
    random = [[(7 * n + k * k) % 96 for k in range(3 + n % 9)] for n in range(1000)]
    said_of = [("random", prompt) for prompt in random]
    dense, head, _ = with_head("dense")
    experts, expert_head, _ = with_head("moe")
    mine, their = random_model("dense"), random_model("moe")
    sides: list[tuple[str, Any, Any, list[Any], dict[str, Any]]] = [
        ("demo in memory", demo, processor, asked, {}),
        ("demo streamed", streamed_demo(6), processor, asked, {}),
        ("demo in 4 bits", quantized_demo(), processor, asked, {}),
        ("random dense, random head", dense, Endless(), said_of, {"draft_model": head}),
        ("random experts, random head", experts, Endless(), said_of, {"draft_model": expert_head}),
        ("random dense, near drafter", mine, Endless(), said_of, {"draft_model": near("dense", 0.02)}),
        ("random experts, near drafter", their, Endless(), said_of, {"draft_model": near("moe", 0.02)}),
    ]
    total = 0
    print(f"{'model':30s}{'answers':>9s}{'tokens':>9s}{'differ':>9s}{'drafted':>9s}{'accepted':>10s}")
    for name, model, reader, questions, options in (side for side in sides if arguments.only in side[0]):
        answers = tokens = differ = drafted = accepted = 0
        while tokens < arguments.tokens / len(sides):
            _, prompt = questions[answers % len(questions)]
            plain = [part.token for part in answer(model, reader, prompt, mtp=False)]
            parts = answer(model, reader, prompt, (1, 2, 3, 4, None)[answers % 5], **options)
            found = [part.token for part in parts]
            differ += sum(a != b for a, b in zip(plain, found, strict=False)) + abs(len(plain) - len(found))
            answers, tokens = answers + 1, tokens + len(plain)
            drafted, accepted = drafted + parts[-1].drafted_tokens, accepted + parts[-1].accepted_tokens
        total += tokens
        print(f"{name:30s}{answers:9d}{tokens:9d}{differ:9d}{drafted:9d}{accepted / max(drafted, 1):10.1%}", flush=True)
    print(f"{total} tokens in all")


def acceptance(arguments: argparse.Namespace) -> None:
    model, processor = load(mtp=True)
    tries: dict[tuple[str, int], list[int]] = {}
    note, about = Pace.guessed, ["all"]

    def watched(self: Pace, count: int, right: int, seconds: float) -> None:
        for place in range(min(right + 1, count)):
            for whose in ("all", about[-1]):
                tries.setdefault((whose, place), []).append(place < right)
        note(self, count, right, seconds)

    Pace.guessed = watched
    for skill, prompt in prompts(processor, {**TEXT_SKILLS, **PICTURE_SKILLS}, arguments.per_skill):
        about.append(skill)
        session = read_before(model, processor, prompt, arguments.session)
        answer(model, processor, prompt, arguments.drafts, session=session)
    Pace.guessed = note
    print(f"{arguments.drafts} drafts a round, {arguments.per_skill} questions a skill; right, if those before were:")
    print(f"{'skill':14s}" + "".join(f"{f'draft {place + 1}':>16s}" for place in range(arguments.drafts)))
    for skill in [*TEXT_SKILLS, *PICTURE_SKILLS, "all"]:
        found = [tries.get((skill, place), []) for place in range(arguments.drafts)]
        cells = [f"{sum(f) / len(f):.1%} of {len(f)}" if f else "-" for f in found]
        print(f"{skill:14s}" + "".join(f"{cell:>16s}" for cell in cells))


def read_before(model: Any, processor: Any, prompt: Any, how: str | None) -> Session | None:
    """A session that has read the prompt and begun to answer it, and what became of it; None: none."""
    if how is None:
        return None
    session = Session(model, processor)
    answer(model, processor, prompt, session=session, max_tokens=1)
    if how == "loaded":
        with TemporaryDirectory() as folder:
            session.save(f"{folder}/session")
            return load_session(f"{folder}/session", model, processor)
    return session.branch() if how == "branched" else session


def speed(arguments: argparse.Namespace) -> None:
    around = circumstances()
    demo, processor = load(mtp=True)
    skills = {skill: TEXT_SKILLS[skill] for skill in ("arithmetic", "sort", "recall", "json", "tools")}
    asked = [prompt for _, prompt in prompts(processor, skills, arguments.per_skill)]
    records = []
    print(f"{arguments.rounds} rounds of {len(asked)} answers in turns, warm; tokens a second: median [least .. most]")
    print(f"{'':34s}{'with':>24s}{'without':>24s}   with / without")
    for place, model in (("in memory", demo), ("streamed", streamed_demo(8))):
        for count in (1, 2, 3, None):
            sides = [_rate_of(model, processor, asked, count, True), _rate_of(model, processor, asked, None, False)]
            pairs = in_turns(sides, arguments.rounds)
            name = f"{place}, {'as many as pay' if count is None else f'{count} drafted at a time'}"
            record = compared("speculative", name, "s", [(1 / ours, 1 / theirs) for ours, theirs in pairs])
            record |= {"answers": len(asked), "model": "demo"}
            records.append(record)
            both = [
                {key: 1 / record[side][other] for key, other in (("median", "median"), ("min", "max"), ("max", "min"))}
                for side in ("ours", "theirs")
            ]
            cells = f"{spread(both[0], '.1f'):>24s}{spread(both[1], '.1f'):>24s}   {spread(record['ratio'], '.2f')}"
            print(f"{name:34s}{cells}", flush=True)
    write(records, around, arguments.out)


def _rate_of(model: Any, processor: Any, asked: list[Any], count: int | None, drafts: bool) -> Callable[[], float]:
    """-> tokens a second over all answers, without their first tokens."""

    def rate() -> float:
        tokens, seconds = 0, 0.0
        for prompt in asked:
            with fixed(count):
                stream = stream_generate(
                    model, processor, prompt, sampling=GREEDY, max_tokens=LONGEST, mtp=drafts,
                    num_draft_tokens=count or 3,
                )  # fmt: skip
                next(stream)
                start = time.perf_counter()
                tokens += sum(1 for _ in stream)
                seconds += time.perf_counter() - start
        return tokens / seconds

    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    same = kinds.add_parser("identical")
    same.add_argument("--tokens", type=int, default=20_000, help="of all models together")
    same.add_argument("--only", default="", help="only models with this word in their names")
    same.set_defaults(run=identical)
    right = kinds.add_parser("acceptance")
    right.add_argument("--per-skill", type=int, default=20)
    right.add_argument("--drafts", type=int, default=MOST)
    right.add_argument("--session", choices=["kept", "branched", "loaded"], help="that has read each question before")
    right.set_defaults(run=acceptance)
    fast = kinds.add_parser("speed")
    fast.add_argument("--rounds", type=int, default=5)
    fast.add_argument("--per-skill", type=int, default=2)
    fast.add_argument("--out", type=Path, help="append the JSON lines to this file")
    fast.set_defaults(run=speed)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
