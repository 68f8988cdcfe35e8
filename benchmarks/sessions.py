"""What a chat of 20 turns pays twice: sessions of this package beside the prompt caches of mlx-lm and mlx-vlm.

    python benchmarks/sessions.py [--rounds 3] [--check] [--out FILE]

The chat is chat_script.py's: thinking, tool calls and pictures, on the demo checkpoint. This package plays it first and
writes down every prompt and answer; then each side, in a process of its own a round, is given the prompts one after the
other and answers as was written down. Counted for each prompt: tokens that the model was run on before the first token
of the answer, and of them those that had been computed already (they begin the prompt as they began the prompt and
answer before); the seconds until the first token; and at the end the bytes that are held for the next prompt.

    ours          stream_generate(session=Session)
    mlx-lm        LRUPromptCache as its server fills it: after the answer, and where the last message is a user's and no
                  message has a picture also after the system message and before the reasoning. It is given the same
                  token ids and takes placeholders of pictures for words
    mlx-lm, words the same with all of these places although there are pictures: what a chat without them would have
    mlx-vlm       stream_generate(apc_manager=APCManager()), with its defaults

--check: ours once more, with the logits of every prompt beside those computed from scratch.
Prints a table, and one JSON line a side (or appends them to FILE), as METHODOLOGY.md describes.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(CHECKOUT)]

from benchmarks import chat_script  # noqa: E402
from benchmarks.measuring import circumstances  # noqa: E402

MOST = 60  # tokens of an answer
SIDES = ("ours", "mlx-lm", "mlx-lm, words", "mlx-vlm")


def play(folder: Path, check: bool) -> None:
    """Plays the chat and writes each prompt down: ids, text, pictures, answer, and where the system message ends."""
    import mlx.core as mx
    import numpy as np

    from mlx_qwen35 import Sampling, Session, load, stream_generate
    from mlx_qwen35.text.screen import call_record

    model, processor = load()
    session, written, worst = Session(model), [], 0.0

    def answer(messages: list[dict[str, Any]]) -> dict[str, Any]:
        nonlocal worst
        prompt = processor.prompt(messages, system=chat_script.SYSTEM, tools=chat_script.TOOLS, enable_thinking=True)
        given = {"session": session, "tools": chat_script.TOOLS, "max_tokens": MOST, "sampling": Sampling()}
        parts = list(stream_generate(model, processor, prompt, **given))
        pictures = [part["image"] for m in messages if isinstance(m["content"], list) for part in m["content"][:-1]]
        files = []
        for picture in pictures:
            files.append(str(folder / f"{hash(picture.tobytes())}.png"))
            picture.save(files[-1])
        text = re.sub(r"(<\|image_pad\|>)+", r"\1", prompt.text)
        tokens = [part.token for part in parts]
        segments = [prompt.turns[1], len(prompt.tokens) - 2] if messages[-1]["role"] == "user" else []
        written.append({"tokens": prompt.tokens, "text": text, "files": files, "answer": tokens, "segments": segments})
        if check:
            logits = model.head(model.hidden(mx.array([prompt.tokens]), None, list(prompt.media))[:, -1:])[0, -1]
            found, fresh = np.array(parts[0].logprobs), np.array(logits - mx.logsumexp(logits))
            assert found.argmax() == fresh.argmax()
            worst = max(worst, float(np.abs(found - fresh).max()))
        said = {"role": "assistant", "content": "".join(part.content for part in parts)}
        if reasoning := "".join(part.reasoning for part in parts):
            said["reasoning_content"] = reasoning
        if calls := [call for part in parts for call in part.tool_calls]:
            said["tool_calls"] = [{"type": "function", "function": call_record(call)} for call in calls]
        return said

    chat_script.play(answer)
    (folder / "script.json").write_text(json.dumps(written))
    if check:
        print(f"Logits beside those from scratch, {len(written)} prompts: {worst:.1e} at most, every argmax the same.")


Answerer = Callable[[dict[str, Any]], tuple[int, float]]  # a prompt -> tokens computed, seconds to the first token


def ours() -> tuple[Answerer, Callable[[], int]]:
    from mlx_qwen35 import Sampling, Session, load, stream_generate

    model, processor = load()
    session = Session(model)

    def answer(turn: dict[str, Any]) -> tuple[int, float]:
        begin, first = time.perf_counter(), 0.0
        given = {"images": turn["files"], "session": session, "max_tokens": MOST, "sampling": Sampling()}
        said = []
        for part in stream_generate(model, processor, turn["tokens"], **given):
            first = first or time.perf_counter() - begin
            said.append(part.token)
        assert said == turn["answer"]
        return part.prompt_tokens, first

    return answer, lambda: session.nbytes


def mlx_lm(words: bool = False) -> tuple[Answerer, Callable[[], int]]:
    import copy

    import mlx.core as mx
    from mlx_lm import load
    from mlx_lm.models.cache import LRUPromptCache, make_prompt_cache

    from mlx_qwen35.library import demo_folder

    model, _ = load(str(demo_folder()))
    model.set_dtype(mx.float32)
    kept = LRUPromptCache()

    def answer(turn: dict[str, Any]) -> tuple[int, float]:
        begin, tokens = time.perf_counter(), turn["tokens"]
        cache, rest = kept.fetch_nearest_cache("demo", tokens)
        cache = make_prompt_cache(model) if cache is None else cache
        at = len(tokens) - len(rest)
        places = turn["segments"] if words or not turn["files"] else []
        for end in [*(e for e in places if e > at), len(tokens)]:
            logits = model(mx.array([tokens[at:end]]), cache=cache)
            mx.eval(logits, [c.state for c in cache])
            at = end
            if end < len(tokens):
                kind = "system" if end == turn["segments"][0] else "user"
                kept.insert_cache("demo", tokens[:end], copy.deepcopy(cache), cache_type=kind)
        first = time.perf_counter() - begin
        for token in turn["answer"]:
            mx.eval(model(mx.array([[token]]), cache=cache))
        kept.insert_cache("demo", tokens + turn["answer"], cache)
        return len(rest), first

    return answer, lambda: kept.nbytes


def mlx_vlm() -> tuple[Answerer, Callable[[], int]]:
    import mlx.core as mx
    from mlx_vlm import load, stream_generate
    from mlx_vlm.apc import APCManager

    from mlx_qwen35.library import demo_folder

    model, processor = load(str(demo_folder()))
    model.set_dtype(mx.float32)
    manager = APCManager()

    def answer(turn: dict[str, Any]) -> tuple[int, float]:
        begin, first = time.perf_counter(), 0.0
        given = {"image": turn["files"] or None, "apc_manager": manager, "max_tokens": len(turn["answer"])}
        for part in stream_generate(model, processor, turn["text"], temperature=0.0, **given):  # noqa: B007
            first = first or time.perf_counter() - begin
        if part.prompt_tokens != len(turn["tokens"]):
            raise SystemExit(f"mlx-vlm makes {part.prompt_tokens} tokens of a prompt of {len(turn['tokens'])}")
        return part.prompt_tokens - part.cached_tokens, first

    return answer, manager.resident_bytes


def run(side: str, folder: Path) -> None:
    """One side through the whole chat; prints a JSON object."""
    sides = {"ours": ours, "mlx-lm": mlx_lm, "mlx-lm, words": lambda: mlx_lm(words=True), "mlx-vlm": mlx_vlm}
    answer, held = sides[side]()
    computed, again, seconds, before = 0, 0, [], []
    for turn in json.loads((folder / "script.json").read_text()):
        tokens = turn["tokens"]
        shared = next((n for n, (a, b) in enumerate(zip(before, tokens, strict=False)) if a != b), len(before))
        count, first = answer(turn)
        computed, again = computed + count, again + max(0, count - (len(tokens) - shared))
        seconds.append(first)
        before = tokens + turn["answer"]
    bytes_held = held()
    times = {"first": statistics.median(seconds), "all": sum(seconds)}
    print(json.dumps({"side": side, "computed": computed, "again": again, "held": int(bytes_held), **times}))


def rounds(count: int, folder: Path) -> Iterator[dict[str, Any]]:
    for turn in range(count):
        for side in SIDES if turn % 2 == 0 else reversed(SIDES):
            command = [sys.executable, __file__, "--side", side, "--folder", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{done.stderr[-3000:]}")
            yield json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        run(args.side, args.folder)
        return
    around = circumstances()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        play(folder, args.check)
        script = json.loads((folder / "script.json").read_text())
        found = list(rounds(args.rounds, folder))
    total = sum(len(turn["tokens"]) for turn in script)
    print(f"{len(script)} prompts of {total:,} tokens together; {around['machine']}, {around['commit']}")
    print(f"{'':13} {'computed':>9} {'of these again':>15} {'first token, median':>20} {'all of them':>12} {'held':>9}")
    for side in SIDES:
        own = [one for one in found if one["side"] == side]
        middle = {key: statistics.median(one[key] for one in own) for key in ("first", "all")}
        counts = own[0]
        print(
            f"{side:13} {counts['computed']:9,} {counts['again']:15,} {1000 * middle['first']:17.0f} ms"
            f" {middle['all']:10.2f} s {counts['held'] / 1e6:6.1f} MB"
        )
        if args.out:
            times = {key: [one[key] for one in own] for key in ("first", "all")}
            with open(args.out, "a") as file:
                file.write(json.dumps({"benchmark": "sessions", **counts, **times, "prompts": total, **around}) + "\n")


if __name__ == "__main__":
    main()
