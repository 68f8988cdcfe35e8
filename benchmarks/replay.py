"""Which experts stay in memory, replayed on routing traces: policies, predictions, prefetching, starts.

    python benchmarks/replay.py [--only STUDY ...] [--per-skill 40] [--tokens 1500] [--layers 12]
    python benchmarks/replay.py --plots          # from the results that are there

Traces (routing.py): the demo's own, of held-out questions and their right replies, and drawn ones in the shape of the
397B (512 experts, 10 for each token; layers are drawn independently, so --layers of its 60 are enough). What is
replayed is the package's own Residency; LFU and Belady's optimum, which it does not have, are here. Only experts are
counted, no bytes are read and no time is taken: a result depends on the trace alone, not on the machine.
Writes benchmarks/results/replay.json, and with matplotlib the plots of docs/streaming/.
Knows traces and pools. Knows no files of weights.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import replay_plots  # noqa: E402
from benchmarks.measuring import circumstances  # noqa: E402
from benchmarks.routing import PREDICTIONS, RENORMED, Trace, record, zipf  # noqa: E402
from mlx_qwen35 import load  # noqa: E402
from mlx_qwen35.experts.residency import PROTECTED, Residency  # noqa: E402
from mlx_qwen35.experts.streamed import POLICY  # noqa: E402

RESULTS = Path(__file__).with_name("results") / "replay.json"
SHAPE_397B = {"num_experts": 512, "top_k": 10}
SKEWS, STAYS = (0.4, 0.7, 1.0), (0.0, 0.3, 0.6)
TYPICAL = {"skew": 0.7, "stay": 0.3}
SHARES = (0.02, 0.06, 0.125, 0.25, 0.375, 0.5, 0.75)  # of a layer's experts in memory, if that is enough for one token
WARM_UP = 400  # tokens that fill the pools and are not counted

Ask = Callable[[Sequence[int]], int]  # experts of one token -> how many of them were not in memory


# Policies


def residency_pool(num_experts: int, slots: int, policy: str) -> Ask:
    residency = Residency(num_experts, slots, policy)

    def ask(experts: Sequence[int]) -> int:
        return len(demand(residency, experts))

    return ask


def demand(residency: Residency, experts: Sequence[int]) -> list[int]:
    """-> those that had to be read."""
    placed = residency.demand(experts)
    assert placed is not None
    residency.release()
    return [expert for expert, _ in placed[1]]


class ByValue:
    """A pool that evicts what has the least value, by a function of (token, experts) -> their values from now on."""

    def __init__(self, num_experts: int, slots: int, value: Callable[[int, np.ndarray], np.ndarray]):
        self.slots, self.value_of = slots, value
        self.value = np.zeros(num_experts)
        self.held = np.zeros(num_experts, bool)
        self.token = 0

    def __call__(self, experts: Sequence[int]) -> int:
        asked = np.asarray(experts)
        missing = int((~self.held[asked]).sum())
        self.value[asked] = self.value_of(self.token, asked)
        self.token += 1
        surplus = int(self.held.sum()) + missing - self.slots
        if surplus > 0:
            self.held[asked], kept = False, self.held[asked]
            candidates = np.flatnonzero(self.held)
            self.held[asked] = kept
            self.held[candidates[np.argpartition(self.value[candidates], surplus - 1)[:surplus]]] = False
        self.held[asked] = True
        return missing


def lfu(num_experts: int) -> Callable[[int, np.ndarray], np.ndarray]:
    """How often an expert was asked for since the beginning; of equals, the one asked for last."""
    counts = np.zeros(num_experts)

    def value(token: int, experts: np.ndarray) -> np.ndarray:
        counts[experts] += 1
        return counts[experts] + token * 1e-7

    return value


def belady(num_experts: int, ids: np.ndarray) -> Callable[[int, np.ndarray], np.ndarray]:
    """Who is asked for soonest, known from the future: no pool of this size reads less."""
    after = np.full(num_experts, len(ids))
    next_use = np.empty_like(ids)
    for token in reversed(range(len(ids))):
        next_use[token] = after[ids[token]]
        after[ids[token]] = token

    return lambda token, experts: -next_use[token].astype(float)


def pools(num_experts: int, slots: int, ids: np.ndarray) -> dict[str, Ask]:
    return {
        "LRU": residency_pool(num_experts, slots, "lru"),
        "SLRU": residency_pool(num_experts, slots, "slru"),
        "LFU": ByValue(num_experts, slots, lfu(num_experts)),
        "Belady": ByValue(num_experts, slots, belady(num_experts, ids)),
    }


def slots_of(num_experts: int, top_k: int, share: float) -> int:
    return max(round(num_experts * share), top_k)


def hit_rate(ask: Ask, ids: np.ndarray) -> float:
    """Of the tokens after the warm-up; ids [tokens, K]."""
    missed = [ask(experts) for experts in ids.tolist()][WARM_UP:]
    return 1 - sum(missed) / ids[WARM_UP:].size


def hit_rates(num_experts: int, layers: Iterable[np.ndarray]) -> dict[str, dict[str, list[float]]]:
    """layers: ids [tokens, K] each -> by share of the experts in memory and policy: the hit rate of each layer."""
    found: dict[str, dict[str, list[float]]] = {}
    for ids in layers:
        for share in SHARES:
            slots = slots_of(num_experts, ids.shape[1], share)
            rates = found.setdefault(f"{slots / num_experts:.3f}", {})
            for name, ask in pools(num_experts, slots, ids).items():
                rates.setdefault(name, []).append(hit_rate(ask, ids))
    return found


def mean(found: Any) -> Any:
    """The same with every list replaced by its mean."""
    if isinstance(found, dict):
        return {key: mean(value) for key, value in found.items()}
    return round(float(np.mean(found)), 4)


def replies(traces: Sequence[Trace]) -> Iterable[np.ndarray]:
    """ids [tokens, K] of each layer: those of all replies, one after the other."""
    for layer in range(len(traces[0].ids)):
        yield np.concatenate([trace.ids[layer, trace.prompt :] for trace in traces])


def policies(traces: Sequence[Trace], layers: int, tokens: int) -> dict[str, Any]:
    of_demo = hit_rates(traces[0].num_experts, replies(traces))
    by_layer = [repeats(ids) for ids in replies(traces)]
    drawn = []
    for topic in (None, 300):
        for skew in SKEWS if topic is None else (TYPICAL["skew"],):
            for stay in STAYS if topic is None else (TYPICAL["stay"],):
                made = {"skew": skew, "stay": stay, "topic": topic}
                trace = zipf(layers=layers, tokens=tokens + WARM_UP, **SHAPE_397B, **made)
                rates = hit_rates(trace.num_experts, trace.ids)
                drawn.append(made | {"repeats": mean([repeats(ids) for ids in trace.ids]), "hit_rate": mean(rates)})
                print("policies", drawn[-1], flush=True)
    return {"demo": {"repeats": [round(r, 4) for r in by_layer], "hit_rate": mean(of_demo)}, "drawn": drawn}


def protected(traces: Sequence[Trace], layers: int, tokens: int) -> list[dict[str, Any]]:
    """Hit rate of SLRU, by how much of the pool is for experts that were asked for again; 0 is LRU."""
    made = [{"skew": TYPICAL["skew"], "stay": stay, "topic": topic} for topic in (None, 300) for stay in STAYS]
    sources = [("demo", traces[0].num_experts, [*replies(traces)], (0.375, 0.5, 0.75))]
    for drawn in made:
        ids = [*zipf(layers=layers, tokens=tokens + WARM_UP, **SHAPE_397B, **drawn).ids]
        sources.append((", ".join(f"{k} {v}" for k, v in drawn.items()), 512, ids, (0.125, 0.25, 0.5)))
    rows = []
    for source, num_experts, of_layers, shares in sources:
        for share in shares:
            slots = slots_of(num_experts, of_layers[0].shape[1], share)
            found = {}
            for part in (0.0, 0.3, 0.5, 0.8, 0.9):
                with patch.dict(PROTECTED, slru=part):
                    rates = [hit_rate(residency_pool(num_experts, slots, "slru"), ids) for ids in of_layers]
                found[part] = mean(rates)
            rows.append({"trace": source, "share": round(slots / num_experts, 3), "hit_rate": found})
            print("protected", rows[-1], flush=True)
    return rows


def repeats(ids: np.ndarray) -> float:
    """The share of experts that the token before had asked for, too."""
    return float((ids[1:, :, None] == ids[:-1, None]).any(-1).mean())


# Predictions


def recall(traces: Sequence[Trace], layers: int, tokens: int) -> dict[str, Any]:
    """By prediction, the share of a layer's experts among the first n named, in replies: for each n, and each layer."""
    found: dict[str, Any] = {}
    top_k = traces[0].ids.shape[-1]
    for name in PREDICTIONS:
        by_layer: dict[int, list[float]] = {}
        for layer in range(len(traces[0].ids)):
            if traces[0].ranked[name][layer, 0, 0] < 0:
                continue
            ids = np.concatenate([trace.ids[layer, trace.prompt :] for trace in traces])
            ranked = np.concatenate([trace.ranked[name][layer, trace.prompt :] for trace in traces])
            place = np.argmax(ranked[:, None] == ids[:, :, None], axis=-1)  # [tokens, K]
            by_layer[layer] = [round(float((place < n).mean()), 4) for n in range(1, ranked.shape[1] + 1)]
        at_k = {layer: values[top_k - 1] for layer, values in by_layer.items()}
        found[name] = {"by_layer": at_k, "by_named": [mean(column) for column in zip(*by_layer.values(), strict=True)]}
        print("recall", name, mean([*at_k.values()]), flush=True)
    return found


# Prefetching


class SparesTheLast(Residency):
    """What was demanded last is not evicted for a prefetch."""

    last: frozenset[int] = frozenset()

    def demand(self, experts: Sequence[int]) -> tuple[list[int], list[tuple[int, int]]] | None:
        self.last = frozenset(experts)
        return super().demand(experts)

    def prefetch(self, experts: Sequence[int], most: int | None = None) -> list[tuple[int, int]]:
        fixed = sum(e in self._waiting or e in self._idle for e in self.last | set(experts))
        room = self._room() - fixed
        return super().prefetch(experts, room if most is None else min(room, most))

    def _place(self, absent: Sequence[int], spared: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
        return super()._place(absent, spared | self.last if spared else spared)


class BelievesPredictions(Residency):
    """A prefetch is as good as a demand: a wrong one is the last to be evicted, not the first."""

    def landed(self, expert: int) -> None:
        self._in_flight.pop(expert)
        self._idle.add(expert, again=False)


RULES: dict[str, Callable[[int, int], Residency]] = {
    "as built": lambda num_experts, slots: Residency(num_experts, slots, POLICY),
    "LRU": Residency,
    "spares the last token's": lambda num_experts, slots: SparesTheLast(num_experts, slots, POLICY),
    "wrong ones stay": lambda num_experts, slots: BelievesPredictions(num_experts, slots, POLICY),
}


def prefetched(residency: Residency, ids: np.ndarray, ranked: np.ndarray, most: int) -> tuple[int, int]:
    """-> experts that were waited for, and experts that were read, after the warm-up. All prefetches land in time."""
    waited = read = 0
    for token, (experts, likely) in enumerate(zip(ids.tolist(), ranked.tolist(), strict=True)):
        loads = residency.prefetch(likely, most)
        for expert, _ in loads:
            residency.landed(expert)
        missed = len(demand(residency, experts))
        if token >= WARM_UP:
            waited += missed
            read += missed + len(loads)
    return waited, read


def prefetch(traces: Sequence[Trace], layers: int, tokens: int) -> list[dict[str, Any]]:
    """Per expert asked for: how many were waited for and how many were read, by pool, rule and prefetches a layer."""
    top_k = traces[0].ids.shape[-1]
    ranked = [
        np.concatenate([trace.ranked[RENORMED][layer, trace.prompt :, :top_k] for trace in traces])
        for layer in range(len(traces[0].ids))
    ]
    drawn = zipf(layers=layers, tokens=tokens + WARM_UP, **SHAPE_397B, **TYPICAL)
    sources = {
        "demo": (traces[0].num_experts, [*replies(traces)][1:], ranked[1:], (0.25, 0.375, 0.5, 0.75), (0, 1, 2, 4)),
        "drawn": (512, drawn.ids, drawn.ranked[RENORMED], (0.02, 0.125, 0.25, 0.5), (0, 1, 2, 3, 4, 6, 8, 10)),
    }
    rows = []
    for source, (num_experts, ids, likely, shares, mosts) in sources.items():
        for share in shares:
            slots = slots_of(num_experts, ids[0].shape[1], share)
            for rule, kind in RULES.items():
                for most in mosts:
                    counts = [
                        prefetched(kind(num_experts, slots), *layer, most) for layer in zip(ids, likely, strict=True)
                    ]
                    asked = sum(layer[WARM_UP:].size for layer in ids)
                    waited, read = (sum(column) / asked for column in zip(*counts, strict=True))
                    row = {"trace": source, "share": round(slots / num_experts, 3), "rule": rule, "most": most}
                    rows.append(row | {"waited": round(waited, 4), "read": round(read, 4)})
            print("prefetch", rows[-1], flush=True)
    return rows


# Starts

HALF_LIVES = {"the last asked for": 1.0, "lately often, half-life 16": 16.0, "the most asked for": 1e9}
FIRST = (1, 4, 16)  # tokens of a reply


def by_importance(num_experts: int, ids: np.ndarray, half_life: float) -> list[int]:
    """Experts of ids [tokens, K], the most important first: by their uses, one `half_life` tokens ago counting half."""
    weight = np.zeros(num_experts)
    np.add.at(weight, ids, 0.5 ** (np.arange(len(ids))[::-1] / half_life)[:, None])
    return [int(expert) for expert in np.argsort(-weight, kind="stable") if weight[expert] > 0]


def starts(traces: Sequence[Trace], layers: int, tokens: int) -> list[dict[str, Any]]:
    """Hit rates over the first tokens of replies, by what is in memory when they begin: nothing, what was in use
    in other conversations (a hot list), or what the prompt leaves behind."""
    half = len(traces) // 2
    drawn = zipf(layers=layers, tokens=2 * tokens, topic=tokens // 2, **SHAPE_397B, **TYPICAL)
    windows = [
        Trace(drawn.num_experts, drawn.ids[:, begin : begin + 256], prompt=256 - FIRST[-1])
        for begin in range(tokens, 2 * tokens - 256, 128)
    ]
    sources = {
        "demo": ([*replies(traces[:half])], traces[half:], (0.25, 0.5)),
        "drawn": ([*drawn.ids[:, :tokens]], windows, (0.125, 0.25, 0.5)),
    }
    rows = []
    for source, (before, conversations, shares) in sources.items():
        num_experts, top_k = conversations[0].num_experts, before[0].shape[1]
        hot = {f"hot list, {name}": [by_importance(num_experts, ids, life) for ids in before]
               for name, life in HALF_LIVES.items()}  # fmt: skip
        for share in shares:
            slots = slots_of(num_experts, top_k, share)
            found: dict[str, list[list[int]]] = {}
            for trace in conversations:
                for layer, ids in enumerate(trace.ids):
                    prompt, reply = ids[: trace.prompt], ids[trace.prompt :][: FIRST[-1]]
                    contents = {"nothing": [], **{name: lists[layer] for name, lists in hot.items()}}
                    for name, life in HALF_LIVES.items():
                        contents[f"prompt, {name}"] = by_importance(num_experts, prompt, life)
                    for name, experts in contents.items():
                        residency = Residency(num_experts, slots, POLICY)
                        residency.admit(experts)
                        found.setdefault(name, []).append([len(demand(residency, e)) for e in reply.tolist()])
            for name, missed in found.items():
                rates = {n: mean([1 - m / top_k for reply in missed for m in reply[:n]]) for n in FIRST}
                rows.append({"trace": source, "share": round(slots / num_experts, 3), "start": name, "first": rates})
                print("starts", rows[-1], flush=True)
    return rows


STUDIES = {"policies": policies, "protected": protected, "recall": recall, "prefetch": prefetch, "starts": starts}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[*STUDIES], choices=STUDIES, help="studies to make again")
    parser.add_argument("--per-skill", type=int, default=40, help="questions for each of the demo's twelve skills")
    parser.add_argument("--tokens", type=int, default=1500, help="of each drawn trace")
    parser.add_argument("--layers", type=int, default=12, help="of each drawn trace")
    parser.add_argument("--plots", action="store_true", help="only draw what is known")
    args = parser.parse_args()
    known: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if not args.plots:
        model, processor = load()
        traces = list(record(model, processor, args.per_skill))
        said = sum(trace.ids.shape[1] - trace.prompt for trace in traces)
        print(f"{len(traces)} questions, {said} tokens of replies, {len(traces[0].ids)} layers", flush=True)
        for name in args.only:
            known[name] = STUDIES[name](traces, args.layers, args.tokens)
            around = circumstances() | {"questions": len(traces), "reply_tokens": said}
            known[name] = {"of": around | {"layers": args.layers, "tokens": args.tokens}, "found": known[name]}
            RESULTS.write_text(json.dumps(known, indent=1) + "\n")
    if not replay_plots.draw(known, ROOT / "docs" / "streaming"):
        print("no plots: pip install matplotlib")


if __name__ == "__main__":
    main()
