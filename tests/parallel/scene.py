"""Rank 0 of a test: one process with a model on ranks and the same model alone, held against each other.

`python -m tests.parallel.scene WHAT RANKS PLAN FOLDER`, FOLDER of a checkpoint, or "demo"; prints what it saw as JSON
on its last line. A process each: MLX joins a group once. Others are started by `load`, on ports of their own.
"""

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx

mx.set_default_device(mx.cpu)

from benchmarks import chat_script  # noqa: E402
from mlx_qwen35 import Sampling, load  # noqa: E402
from mlx_qwen35.engine.engine import Engine  # noqa: E402
from mlx_qwen35.generation import stream_generate  # noqa: E402
from mlx_qwen35.library.portions import options_of  # noqa: E402
from mlx_qwen35.library.ranked import load_leader  # noqa: E402
from mlx_qwen35.parallel.follower import hash_of  # noqa: E402
from mlx_qwen35.session import Session, load_session  # noqa: E402

PROMPT = [5, 7, 9, 11, 3, 2, 60, 61, 62, 63, 1, 17, 4, 33, 21, 8, 40]
GREEDY = Sampling(temperature=0)


def far(a: mx.array, b: mx.array) -> float:
    return mx.abs(a.astype(mx.float32) - b.astype(mx.float32)).max().item()


def logits(ranked: Any, alone: Any, steps: int) -> dict[str, Any]:
    """Whole, in pieces, token by token, back to a snapshot, of two rows padded on the left."""
    tokens, seen = mx.array([PROMPT]), {}
    seen["whole"] = far(ranked(tokens), alone(tokens))
    caches = [model.make_cache() for model in (ranked, alone)]
    for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:]):
        a, b = (model(part, cache) for model, cache in zip((ranked, alone), caches, strict=True))
        seen["pieces"] = max(seen.get("pieces", 0), far(a, b))
    before = [cache.snapshot() for cache in caches]
    said: list[list[int]] = [[], []]
    for _ in range(steps):
        token = mx.argmax(b[:, -1:], axis=-1)
        said[0].append(mx.argmax(a[:, -1]).item())
        said[1].append(token.item())
        a, b = (model(token, cache) for model, cache in zip((ranked, alone), caches, strict=True))
        seen["steps"] = max(seen.get("steps", 0), far(a, b))
    seen["tokens alike"] = said[0] == said[1]
    for cache, snapshot in zip(caches, before, strict=True):
        cache.restore(snapshot)
    other, _ = caches[0].branch()
    part = mx.array([[50, 51, 52]])
    a, b = ranked(part, caches[0]), alone(part, caches[1])
    seen["back"] = far(a, b)
    caches[1].restore(before[1])
    seen["branch"] = far(ranked(part + 1, other), alone(part + 1, caches[1]))
    rows, padding = mx.array([PROMPT[:6], [0, 0, *PROMPT[:4]]]), [0, 2]
    batch = [model.make_cache(2, padding) for model in (ranked, alone)]
    for part in (rows[:, :4], rows[:, 4:5], rows[:, 5:]):
        a, b = (model(part, cache) for model, cache in zip((ranked, alone), batch, strict=True))
        seen["padded"] = max(seen.get("padded", 0), far(a[0], b[0]), far(a[1, -1], b[1, -1]))
    return seen


def answers(ranked: Any, alone: Any, processor: Any, folder: Path) -> dict[str, Any]:
    """An answer with a picture in a session, saved and loaded; drafts; several at once."""
    seen: dict[str, Any] = {}
    images = [chat_script.picture(3)]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is in the picture?"}]}]
    told = {}
    for name, model in (("ranked", ranked), ("alone", alone)):
        session, texts = Session(model, processor), []
        messages = list(asked)
        for question in ("Where is it?", "What is 17 + 25?"):
            parts = list(
                stream_generate(model, processor, messages, images=images, session=session, max_tokens=12,
                                sampling=GREEDY, num_draft_tokens=2)
            )  # fmt: skip
            texts.append("".join(part.text for part in parts))
            content = "".join(part.content for part in parts)
            messages += [{"role": "assistant", "content": content}, {"role": "user", "content": question}]
            path = folder / f"{name}.session"
            session.save(path)
            session = load_session(path, model, processor)
        texts.append(session.branch().tokens)
        told[name] = texts
        seen[f"{name} drafted"] = parts[-1].drafted_tokens
    seen["sessions alike"] = told["ranked"] == told["alone"]
    seen["texts"] = told["alone"][:2]
    seen["files"] = sorted(path.name.partition("-")[0] for path in folder.iterdir())
    questions = [f"What is {number} + 25?" for number in (17, 30, 41)]
    many = {}
    for name, model in (("ranked", ranked), ("alone", alone)):
        with Engine(model, processor, most_rows=3) as engine:
            given = [
                engine.submit(question, max_tokens=8 + 3 * number, sampling=GREEDY)
                for number, question in enumerate(questions)
            ]
            many[name] = [answer.result().text for answer in given]
    seen["batches alike"] = many["ranked"] == many["alone"]
    made = {name: stored(model, processor, folder / "stored" / name)
            for name, model in (("ranked", ranked), ("alone", alone))}  # fmt: skip
    seen["stored alike"] = [text for text, _ in made["ranked"]] == [text for text, _ in made["alone"]]
    seen["stored"] = {name: [cached for _, cached in each] for name, each in made.items()}
    return seen


def stored(model: Any, processor: Any, folder: Path) -> list[tuple[str, int]]:
    """Answers of engines one after the other, with one folder for what was computed, and how much of the prompt each
    found there; before the last one a share is lost."""
    found = []
    for number, question in enumerate(("What is 17 + 25?", "What is 30 + 25?", "What is 41 + 25?")):
        for share in folder.glob("*.rank1of*") if number == 2 else ():
            share.unlink()
        asked = [{"role": "system", "content": "Be brief. " * 40}, {"role": "user", "content": question}]
        with Engine(model, processor, cache_dir=folder) as engine:
            answer = engine.submit(asked, max_tokens=8, sampling=GREEDY).result()
        found.append((answer.text, answer.cached_tokens))
    return found


def main(what: str, count: int, plan: str, given: str, **more: Any) -> dict[str, Any]:
    if given == "demo":
        made = Path(more.pop("folder"))
        ranked, processor = load(ranks=count, plan=plan, memory="2GB", mtp=True, warm_start=False, **more)
        alone, _ = load(mtp=True, **more)
        seen = answers(ranked, alone, processor, made)
    else:
        chosen = {"dtype": None, "context_length": None, "yarn": False, "kv_form": None, "exact": False,
                  "kernels": True} | more  # fmt: skip
        from mlx_qwen35.library import load_model

        memory = what.partition(":")[2] or "2GB"
        ranked = load_leader(Path(given), count, options_of(plan=plan, **chosen), memory=memory, warm_start=False)
        alone = load_model(given)
        seen = logits(ranked, alone, 24)
        seen["streamed"] = ranked.expert_stats is not None
    seen["plan"] = ranked.plan.kind
    seen["hash"] = hash_of(ranked.hidden(mx.array([PROMPT[:9]])))
    seen["traffic"] = vars(ranked.group.traffic)
    seen["others"] = ranked.ranks.ask(statistics=True)
    seen["memory"] = mx.get_active_memory()
    ranked.unload()
    return seen


if __name__ == "__main__":
    what, count, plan, given, *rest = sys.argv[1:]
    print(json.dumps(main(what, int(count), plan, given, **({"folder": rest[0]} if rest else {}))))
