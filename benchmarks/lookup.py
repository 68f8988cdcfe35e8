"""What copies of earlier text bring: tokens a step and a second, beside plain decoding and the MTP head alone.

    python benchmarks/lookup.py speed [--rounds 3] [--turns 20] [--only WORD] [--out FILE]
    python benchmarks/lookup.py together [--rounds 3] [--out FILE]  # json, in 2, 3, 4 and 8 rows of an Engine
    python benchmarks/lookup.py memory [--tokens 200000]            # of a decode over a session of so many tokens

Tasks, generated and seeded. json: the demo repeats the longest objects that it was taught. recall: it answers questions
about texts of up to sixty statements, with the statement as its thought. editor: a session in which each turn names a
change to a file and the answer is the file again, with that change. prose: words in random order, few of which repeat.
The demo knows neither of the last two, so that what it says is a script: everything is computed as usual, and then the
script's token gets the highest logit. Its MTP head does not know the script either: its j-th guess is set to the
script's token as often as the demo's head is right on its own questions (96.9, 58.4, 58.6 %), by a seed.

Sides take turns in one run, in memory and with half of the experts streamed. Ratios are formed round by round. Sessions
are kept from turn to turn; the prompt's time is not in the figures. Figures of a CPU say nothing about Metal.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools" / "train_demo")]

from text_skills import NAMES, copy_json, recall  # noqa: E402

from benchmarks.measuring import circumstances, compared, in_turns, summary, write  # noqa: E402
from benchmarks.speculative import streamed_demo  # noqa: E402
from mlx_qwen35 import Engine, Sampling, Session, load, stream_generate  # noqa: E402
from mlx_qwen35.cache import Cache  # noqa: E402
from mlx_qwen35.engine.drafted import Drafted  # noqa: E402
from mlx_qwen35.engine.group import Seat  # noqa: E402
from mlx_qwen35.machine.system import forget_peak, peak_resident_memory  # noqa: E402
from mlx_qwen35.model import Model  # noqa: E402
from mlx_qwen35.sampling import History, Sampler  # noqa: E402
from mlx_qwen35.speculative.drafters import HeadDrafter  # noqa: E402
from mlx_qwen35.speculative.lookup import Lookup  # noqa: E402
from mlx_qwen35.speculative.text import Text, Texts  # noqa: E402

RIGHT = 0.969, 0.584, 0.586, 0.5  # the demo's head, docs/SPECULATIVE.md
SIDES = {
    "plain": {"mtp": False, "lookup": False},
    "MTP": {"mtp": True, "lookup": False},
    "lookup": {"mtp": False, "lookup": True},
    "both": {"mtp": True, "lookup": True},
}
Turn = tuple[Any, list[int] | None]  # a prompt, and what is said to it (None: what the model says)


class Scripted(Model):
    """A model that computes as it did and then says what it is told to. script: of the answer behind `begin` tokens."""

    script: list[int] | None = None
    begin = 0
    at: tuple[int, int] | None = None  # the first token and how many, of whose hidden states the head is asked

    def hidden(self, tokens: mx.array, cache: Any = None, *others: Any, **named: Any) -> mx.array:
        start = cache.offset if isinstance(cache, Cache) else 0
        made = super().hidden(tokens, cache, *others, **named)
        self.__dict__["at"] = start, tokens.shape[1]
        return made

    def head(self, hidden: mx.array) -> mx.array:
        logits = super().head(hidden)
        if self.script is None or self.at is None:
            return logits
        start, length = self.at
        first = start + length - hidden.shape[1] + 1 - self.begin  # of the script's tokens, the first asked for
        said = [self.script[n] if 0 <= n < len(self.script) else 0 for n in range(first, first + hidden.shape[1])]
        return logits + 1000.0 * (mx.arange(logits.shape[-1]) == mx.array(said)[:, None])


@contextmanager
def scripted(model: Model, begin: int, script: list[int] | None) -> Iterator[None]:
    """The model says the script after `begin` tokens, and its head guesses it now and then; None: both as they are."""
    if script is None:
        yield
        return
    kind, guess = model.__class__, HeadDrafter.guess

    def guessed(self: HeadDrafter, token: mx.array, count: int, choose: Callable[[mx.array], mx.array]) -> None:
        place, number = self.cache.offset + 1 - begin, 0

        def told(logits: mx.array) -> mx.array:
            nonlocal number
            at = place + number
            right = random.Random(f"{at}/{number}").random() < RIGHT[number]
            number += 1
            wanted = script[at] if 0 <= at < len(script) and right else 1
            return choose(logits + 1000.0 * (mx.arange(logits.shape[-1]) == wanted))

        model.__dict__["at"] = None
        guess(self, token, count, told)

    model.__class__ = Scripted
    model.__dict__.update(script=script, begin=begin)
    try:
        with patch.object(HeadDrafter, "guess", guessed):
            yield
    finally:
        model.__class__ = kind
        for name in ("script", "begin", "at"):
            model.__dict__.pop(name, None)


def json_task(processor: Any, turns: int) -> list[list[Turn]]:
    found, number = [], 0
    while len(found) < turns // 3:
        case, number = copy_json(random.Random(f"json/{number}")), number + 1
        if len(case.key) > 120:  # the longest that the demo was taught
            found.append([([{"role": "user", "content": f"Repeat: {case.key}"}], None)])
    return found


def recall_task(processor: Any, turns: int) -> list[list[Turn]]:
    found, number = [], 0
    while len(found) < turns // 3:
        case, number = recall(random.Random(f"recall/{number}")), number + 1
        if len(case.key) > 900:
            text = case.messages[-1]["content"]
            rest = [f"{text.rsplit(chr(10), 1)[0]}\n{more.messages[-1]['content']}" for more in case.follow_ups]
            found.append([([{"role": "user", "content": each}], None) for each in (text, *rest)])
    return found


WORDS = "index value count state token cache layer queue table field total limit offset buffer stream reader".split()


def line(rng: random.Random) -> str:
    a, b, c = (rng.choice(WORDS) for _ in range(3))
    return "    " + rng.choice((f"{a} = {b}.get({c})", f"if {a} > {b}:", f"    return {a} + {b}", f"{a}.append({c})"))


def file(rng: random.Random) -> list[str]:
    made = []
    for _ in range(2):  # twenty turns are to fit into what the demo reads
        name = f"{rng.choice(WORDS)}_{rng.choice(WORDS)}"
        made += [f"def {name}({rng.choice(WORDS)}):", *(line(rng) for _ in range(2)), ""]
    return made


def editor_task(processor: Any, turns: int) -> list[list[Turn]]:
    """Two files in one conversation; each turn changes a line, adds one or takes one out of one of them."""
    rng, encode = random.Random("editor"), processor.tokenizer.encode
    files, said, messages = [file(rng), file(rng)], [], []
    for number in range(turns):
        text = files[rng.randrange(2)]
        at, kind = rng.randrange(1, len(text) - 1), rng.randrange(3)
        new = line(rng)
        asked = (f"Change line {at} to: {new}", f"Add after line {at}: {new}", f"Take out line {at}")[kind]
        shown = "\n\n".join("\n".join(each) for each in files) + "\n\n" if number == 0 else ""
        text[at : at + 1] = ([new], [text[at], new], [])[kind]
        messages = [*messages, {"role": "user", "content": shown + asked}]
        answer = "\n".join(text)
        said.append((messages, encode(answer)))
        messages = [*messages, {"role": "assistant", "content": answer}]
    return [said]


def prose_task(processor: Any, turns: int) -> list[list[Turn]]:
    """Every word is one of many, drawn by lot."""
    found = []
    for number in range(turns // 4):
        rng = random.Random(f"prose/{number}")
        ids = [rng.randrange(20, 900) for _ in range(120)]
        found.append([([{"role": "user", "content": f"Write about {rng.choice(NAMES)}."}], ids)])
    return found


TASKS = {"json": json_task, "recall": recall_task, "editor": editor_task, "prose": prose_task}


def run(model: Model, processor: Any, task: list[list[Turn]], side: str, thinks: bool) -> dict[str, Any]:
    """-> of all answers: tokens, tokens a second behind the first, calls of the model, tokens by who drafted them."""
    tokens, timed, seconds, steps, drafts, answers = 0, 0, 0.0, 0, {}, []
    for conversation in task:
        session = Session(model, processor)
        Texts.of(model).clear()  # or it would know the answers from the round before
        for messages, script in conversation:
            prompt = processor.prompt(messages, enable_thinking=thinks)
            limit = 400 if script is None else len(script)
            with scripted(model, len(prompt.tokens), script):
                stream = stream_generate(
                    model, processor, prompt, session=session, sampling=Sampling(), max_tokens=limit, **SIDES[side]
                )
                parts = [next(stream)]
                start = time.perf_counter()
                parts += stream
                seconds += time.perf_counter() - start
            tokens, timed = tokens + len(parts), timed + len(parts) - 1
            steps += sum(not part.from_draft for part in parts)
            answers.append([part.token for part in parts])
            for source, (made, right) in parts[-1].drafts.items():
                before = drafts.get(source, (0, 0))
                drafts[source] = before[0] + made, before[1] + right
    return {"tokens": tokens, "rate": timed / seconds, "steps": steps, "drafts": drafts, "answers": answers}


def speed(arguments: argparse.Namespace) -> None:
    around, records = circumstances(), []
    demo, processor = load(mtp=True)
    models = {"in memory": demo, "streamed": streamed_demo(8)}
    print(f"{arguments.rounds} rounds in turns, warm; tokens a second (median), tokens a step, over plain and over MTP")
    print(f"{'':22s}" + "".join(f"{side:>16s}" for side in SIDES) + f"{'a step':>8s}{'/ plain':>22s}{'/ MTP':>22s}")
    for place, model in models.items():
        for name, make in TASKS.items():
            if arguments.only not in f"{name} {place}":
                continue
            task = make(processor, arguments.turns)
            sides = [partial(run, model, processor, task, side, name == "recall") for side in SIDES]
            rounds = in_turns(sides, arguments.rounds)
            for made in rounds:
                assert all(each["answers"] == made[0]["answers"] for each in made), "a draft changed an answer"
            rates = {side: [made[at]["rate"] for made in rounds] for at, side in enumerate(SIDES)}
            both = rounds[-1][-1]
            step, cells = both["tokens"] / both["steps"], ""
            for other in ("plain", "MTP"):
                pairs = [(1 / ours, 1 / theirs) for ours, theirs in zip(rates["both"], rates[other], strict=True)]
                record = compared("lookup", f"{name}, {place}, over {other}", "s a token", pairs)
                record |= {"tokens": both["tokens"], "tokens_a_step": step, "drafts": both["drafts"], "model": "demo"}
                records.append(record)
                ratio = record["ratio"]
                cells += f"   {ratio['median']:.2f} [{ratio['min']:.2f} .. {ratio['max']:.2f}]"
            shown = "".join(f"{summary(rates[side])['median']:16.1f}" for side in SIDES)
            print(f"{name + ', ' + place:22s}{shown}{step:8.2f}{cells}  {both['drafts']}", flush=True)
    write(records, around, arguments.out)


def together(arguments: argparse.Namespace) -> None:
    """Tokens a second of an Engine whose rows all repeat objects, with copies and without, prompts included."""
    around, records = circumstances(), []
    model, processor = load()
    prompts = [messages for ((messages, _),) in json_task(processor, 24)]
    options = {"max_tokens": 300, "sampling": Sampling(), "enable_thinking": False}

    def answered(rows: int, lookup: bool) -> tuple[float, list[list[int]]]:
        with Engine(model, processor, most_rows=rows) as engine:
            start = time.perf_counter()
            with engine.expecting():
                answers = [engine.submit(prompt, lookup=lookup, **options) for prompt in prompts]
            said = [[part.token for part in answer] for answer in answers]
            return sum(map(len, said)) / (time.perf_counter() - start), said

    print(f"{len(prompts)} answers, {arguments.rounds} rounds in turns; tokens a second: plain, with copies, ratio")
    for rows in (2, 3, 4, 8):
        rounds = in_turns([partial(answered, rows, False), partial(answered, rows, True)], arguments.rounds)
        assert all(plain[1] == copied[1] for plain, copied in rounds), "a copy changed an answer"
        pairs = [(1 / copied[0], 1 / plain[0]) for plain, copied in rounds]
        record = compared("lookup", f"json, {rows} rows, over plain", "s a token", pairs)
        records.append(record | {"model": "demo", "rows": rows})
        plain, copied = (summary(made[at][0] for made in rounds)["median"] for at in (0, 1))
        told = "{median:.2f} [{min:.2f} .. {max:.2f}]".format_map(record["ratio"])
        print(f"{rows} rows {plain:8.1f}{copied:8.1f}   {told}")
    write(records, around, arguments.out)


def memory(arguments: argparse.Namespace) -> None:
    """The most that this process takes while it decodes, with a text of so many tokens and without. (The text stands
    beside the cache, not in it: how much a lookup takes does not hang on the model.)"""
    model, _ = load()
    rng, tokens = random.Random(5), []
    while len(tokens) < arguments.tokens:
        start = rng.randrange(max(len(tokens) - 500, 1))
        repeated = len(tokens) > 1000 and rng.random() < 0.5
        new = [int(rng.paretovariate(0.7)) % 1000 for _ in range(300)]
        tokens += tokens[start : start + 400] if repeated else new
    del tokens[arguments.tokens :]
    peaks = []
    for text in (None, None, Text(model, tokens)):
        forget_peak()
        cache, sampling = model.make_cache(), Sampling(logit_bias={token: 30.0 for token in range(20, 24)})
        seat = Seat(cache, Sampler(sampling), History(sampling, [tokens[:1]], 1024), text=text)
        seat.draw_first(model(mx.array([tokens[:200]]), cache)[:, -1])
        drafted, made, sources = Drafted(model, seat), 0, Counter()
        while made < 300:
            steps = drafted.steps(300 - made)
            made += len(steps)
            sources[steps[0].source] += 1
            for step in steps if text is not None else ():
                text.add(step.token)
        peaks.append(peak_resident_memory())
    more = (peaks[2] - peaks[1]) / 1e6
    print(f"{len(tokens):,} tokens: at most {more:.1f} MB more; rounds by source {dict(sources)}")
    start = time.process_time()
    lookup = Lookup(tokens)
    seconds = time.process_time() - start
    print(f"{seconds / len(tokens) * 1e6:.1f} us a token to take in, {lookup.nbytes / 1e6:.1f} MB of arrays")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(required=True)
    fast = kinds.add_parser("speed")
    fast.add_argument("--rounds", type=int, default=3)
    fast.add_argument("--turns", type=int, default=20)
    fast.add_argument("--only", default="", help="only tasks with this in their names, such as 'editor in memory'")
    fast.add_argument("--out", type=Path, help="append the JSON lines to this file")
    fast.set_defaults(run=speed)
    several = kinds.add_parser("together")
    several.add_argument("--rounds", type=int, default=3)
    several.add_argument("--out", type=Path, help="append the JSON lines to this file")
    several.set_defaults(run=together)
    small = kinds.add_parser("memory")
    small.add_argument("--tokens", type=int, default=200_000)
    small.set_defaults(run=memory)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
