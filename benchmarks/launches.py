"""How many operations a decode step launches, and how many bytes it moves: this package beside mlx-lm, by one rule.

    python benchmarks/launches.py [--size 35B-A3B ...] [--layers 8] [--context 4096] [--rows 1] [--batch 1] [--list]

Both models are built as they are on a Mac, with the published geometry and so many layers, and one decode step is
traced (graph.py has the rule and pretends that Metal is there). What one delta-net layer and one attention layer add is
then counted as often as the published model has them. Nothing is computed and no weight exists, so that the 397B is
counted on any machine: nothing here is a speed. `--rows 4` is a step that verifies three drafted tokens; `--batch 8`
one of eight sequences, whose lengths go up to --context in equal steps (mlx-lm pads them to the longest); `--side
exact` is this package as exact=True has it; `--side 2-bit rotated` are it with weights of 2 bits in groups of 128,
and with the same behind rotations, as Ternary-Bonsai has them (dense sizes).

Bytes: what each operation must at least read and write, summed; of a stack of experts those that are chosen. The bound
beside it is what any decode step must move: each weight of the trunk and of the chosen experts once, keys and values of
the context, and the delta states read and written. Activations are not in the bound. "asked for" counts a matrix
once for each row of a gathered product of one matrix, which is what moves where no cache keeps it.

Knows how both projects build a model and what a cache holds. Knows nothing of Metal's speed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

from benchmarks import geometry  # noqa: E402
from benchmarks.graph import Launch, PretendedMetal, at_load, mark, shape_only, trace  # noqa: E402
from benchmarks.launches_caches import IN_TAIL, Held, OurRows, OurRowsApart, PeerRows  # noqa: E402
from benchmarks.measuring import circumstances, write  # noqa: E402

QUANTIZATION = {"group_size": 64, "bits": 4}
TWO_BITS = {"group_size": 128, "bits": 2}
ROTATED = 512  # columns of a rotation's block: every width of every size is a multiple
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")  # at 8 bits, as mlx-lm's converter has them
BANKS = (".experts.", ".switch_mlp.")
COUNTED = ("35B-A3B", "397B-A17B", "27B", "0.8B")


@dataclass(frozen=True)
class Step:
    """A decode step of one model as it was traced. arguments: name -> array; run(**arguments) -> its outputs."""

    kinds: tuple[str, ...]
    arguments: dict[str, mx.array]
    run: Callable[..., Any]
    embedding: str  # prefix of the names of a table of which one row is read; "" where the head reads it whole
    experts: float  # the part of a bank that is chosen, at most
    held: Held  # what the caches hold


@dataclass(frozen=True)
class Count:
    """Launches and bytes of a decode step at the published depth; held: bytes of all weights and of the cache.

    asked: bytes moved, a matrix counted once for each row of a gathered product.
    """

    launches: int
    moved: int
    asked: int
    bound: int
    held: int
    by_kind: dict[str, list[Launch]]  # "first", "linear_attention", "full_attention", and "around" the layers
    times: dict[str, int]


def our_step(
    config: dict[str, Any],
    context: int,
    rows: int = 1,
    batch: int = 1,
    *,
    exact: bool = False,
    form: Mapping[str, int] = QUANTIZATION,
    rotated: bool = False,
) -> Step:
    """Of this package; call it within PretendedMetal. Of several rows the state after each is kept."""
    from mlx_qwen35.config import ModelConfig
    from mlx_qwen35.model import Model

    model, text = Model(ModelConfig.from_dict(config)), config["text_config"]
    held = Held(text, context)
    if batch > 1:
        held = (OurRowsApart if exact else OurRows)(text, context, batch)
    cache = held.make(model) if batch > 1 else model.make_cache()

    def loaded() -> None:
        share_signs(model)
        model.join()
        if exact:
            model.be_exact()

    def call(token: mx.array) -> mx.array:
        if batch == 1:
            cache.offset = context
        with cache.each_step() if rows > 1 else nullcontext():
            return model(token, cache)

    return _step(model, cache.layers, config, held, loaded, call, rows, form, rotated=rotated)


def rotate(model: Any) -> None:
    """Put what is packed behind rotations of its inputs."""
    for module in model.modules():
        if hasattr(module, "bits"):
            module.signs, module.block = mx.ones((module.weight.shape[-1] * 32 // module.bits,)), ROTATED


def share_signs(model: Any) -> None:
    """Give all maps of one width the same signs, as Ternary-Bonsai's have them, so that they can be joined."""
    known: dict[int, mx.array] = {}
    for module in model.modules():
        if "signs" in module:
            module.signs = known.setdefault(module.signs.size, module.signs)


def two_bit_step(config: dict[str, Any], context: int, rows: int = 1, batch: int = 1) -> Step:
    return our_step(config, context, rows, batch, form=TWO_BITS)


def rotated_step(config: dict[str, Any], context: int, rows: int = 1, batch: int = 1) -> Step:
    return our_step(config, context, rows, batch, form=TWO_BITS, rotated=True)


def exact_step(config: dict[str, Any], context: int, rows: int = 1, batch: int = 1) -> Step:
    """Of this package with exact=True."""
    return our_step(config, context, rows, batch, exact=True)


def peer_step(config: dict[str, Any], context: int, rows: int = 1, batch: int = 1) -> Step:
    """Of mlx-lm; call it within PretendedMetal."""
    from importlib import import_module

    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model = module.Model(module.ModelArgs.from_dict(json.loads(json.dumps(config))))
    held = PeerRows(config["text_config"], context, batch) if batch > 1 else Held(config["text_config"], context)
    caches = held.make(model) if batch > 1 else model.make_cache()
    return _step(model, caches, config, held, lambda: None, lambda token: model(token, cache=caches), rows)


SIDES = {"ours": our_step, "mlx-lm": peer_step}
ALL_SIDES = SIDES | {"exact": exact_step}
DENSE_SIDES = {"2-bit": two_bit_step, "rotated": rotated_step}


def _step(
    model: Any,
    caches: list[Any],
    config: dict[str, Any],
    held: Held,
    loaded: Callable[[], None],
    call: Callable[..., Any],
    rows: int,
    form: Mapping[str, int] = QUANTIZATION,
    *,
    rotated: bool = False,
) -> Step:
    """caches: one a layer, of either project; held: what is in them.

    loaded: what the project does once the weights are there. form: of what is packed; rotated: behind rotations.
    """
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_unflatten

    text = config["text_config"]

    def spec(path: str, module: nn.Module) -> bool | dict[str, int]:
        if not hasattr(module, "to_quantized") or (form is TWO_BITS and path.endswith(("in_proj_a", "in_proj_b"))):
            return False
        return {**form} | ({"bits": 8} if path.endswith(ROUTERS) else {})

    nn.quantize(model, class_predicate=spec)
    if rotated:
        rotate(model)
    model.eval()
    wide = ("A_log", ".signs")
    weights = {
        name: shape_only(a.shape, mx.bfloat16 if a.dtype == mx.float32 and not name.endswith(wide) else a.dtype)
        for name, a in tree_flatten(model.parameters())
        if not name.startswith(("vision", "rope"))
    }
    kinds = tuple(text["layer_types"])
    states = {
        f"cache.{number}.{name}": array
        for number, kind in enumerate(kinds)
        for name, array in held.states(kind).items()
    }

    def run(token: mx.array, **given: mx.array) -> Any:
        model.update(tree_unflatten([(name, given[name]) for name in weights]))
        with at_load():
            loaded()
        for number, (kind, cache) in enumerate(zip(kinds, caches, strict=True)):
            held.fill(cache, kind, [given[name] for name in states if name.startswith(f"cache.{number}.")])
        with _Marked(type(model.layers[0])):
            logits = call(token)
        return logits, [held.after(cache, kind) for kind, cache in zip(kinds, caches, strict=True)]

    arguments = {"token": shape_only((held.batch, rows), mx.uint32)} | weights | states
    table = next(name.partition("embed_tokens")[0] for name in weights if "embed_tokens" in name) + "embed_tokens."
    chosen = held.batch * rows * text.get("num_experts_per_tok", 0)
    part = min(1.0, chosen / text["num_experts"]) if "num_experts" in text else 1.0
    return Step(kinds, arguments, run, "" if text["tie_word_embeddings"] else table, part, held)


class _Marked:
    """Within it, a border stands before the first layer and after each."""

    def __init__(self, layer: type):
        self._layer, self._call = layer, layer.__call__

    def __enter__(self) -> None:
        call, first = self._call, [True]

        def marked(layer: Any, x: mx.array, *args: Any, **kwargs: Any) -> Any:
            x = mark(x) if first.pop() else x
            first.append(False)
            return mark(call(layer, x, *args, **kwargs))

        self._layer.__call__ = marked

    def __exit__(self, *_: object) -> None:
        self._layer.__call__ = self._call


def touched(step: Step) -> dict[str, float]:
    """The part of each stack of experts that the tokens need, and of each cache what is held."""
    parts = {name: step.experts for name in step.arguments if any(bank in name for bank in BANKS)}
    for number, kind in enumerate(step.kinds):
        parts |= {f"cache.{number}.{name}": part for name, part in step.held.touched(kind).items()}
    return parts


def bound(step: Step) -> dict[str, int]:
    """Bytes that a step cannot do without, of one layer of each kind and around the layers."""
    parts = touched(step)

    def least(name: str, array: mx.array) -> float:
        if step.embedding and name.startswith(step.embedding):
            return array.nbytes / array.shape[0] * step.held.batch
        if name.startswith("cache."):
            return step.held.least(name.split(".", 2)[2], array)
        return array.nbytes * parts.get(name, 1.0)

    return _by_kind(step, least)


def _by_kind(step: Step, of: Callable[[str, mx.array], float]) -> dict[str, int]:
    """of(name, array) added up over the arguments, for one layer of each kind and around the layers."""
    totals: dict[str, float] = Counter()
    for name, array in step.arguments.items():
        number = next((int(word) for word in name.split(".") if word.isdigit()), None)
        totals["around" if number is None else step.kinds[number]] += of(name, array)
    totals = {kind: round(total / (step.kinds.count(kind) or 1)) for kind, total in totals.items()}
    return totals | {"first": totals[step.kinds[0]]}


def count(side: str, size: str, layers: int, context: int, rows: int = 1, batch: int = 1) -> Count:
    """Within PretendedMetal. Raises ValueError where layers of one kind differ, so that none can stand for all."""
    step = (ALL_SIDES | DENSE_SIDES)[side](geometry.config(size, layers), context, rows, batch)
    launches = trace(step.run, step.arguments, touched=touched(step))
    by_layer = [[launch for launch in launches if launch.layer == number] for number in range(layers + 2)]
    by_kind = {"around": by_layer[0] + by_layer[-1], "first": by_layer[1]}  # nothing waits to be added before the first
    for number, kind in enumerate(step.kinds[1:], 2):
        first = by_kind.setdefault(kind, by_layer[number])
        if [(a.name, a.read, a.written) for a in first] != [(a.name, a.read, a.written) for a in by_layer[number]]:
            raise ValueError(f"layer {number - 1} of {size} launches other operations than another {kind} layer")
    published = geometry.config(size)["text_config"]["layer_types"]
    times = {kind: published[1:].count(kind) for kind in set(step.kinds)} | {"around": 1, "first": 1}
    least, held = bound(step), _by_kind(step, lambda _, array: array.nbytes)
    return Count(
        launches=sum(times[kind] * sum(a.count for a in found) for kind, found in by_kind.items()),
        moved=sum(times[kind] * sum(a.read + a.written for a in found) for kind, found in by_kind.items()),
        asked=sum(times[kind] * sum(map(asked_for, found)) for kind, found in by_kind.items()),
        bound=sum(times[kind] * least[kind] for kind in times),
        held=sum(times[kind] * held[kind] for kind in times),
        by_kind=by_kind,
        times=times,
    )


def asked_for(launch: Launch) -> int:
    """Bytes of a launch; of a gathered product [rows, 1, out] with one matrix, that matrix for each row."""
    alone = launch.name in ("GatherQMM", "GatherMM") and not any(bank in n for n in launch.inputs for bank in BANKS)
    return launch.read * (launch.shape[0] if alone else 1) + launch.written


def table(size: str, counts: dict[str, Count]) -> list[str]:
    """Lines: the operations of each layer kind of each side, and the sums."""
    lines = [f"\n{size}: operations that launch, by kind of layer"]
    for kind in sorted(next(iter(counts.values())).times):
        lines.append(f"  {kind}")
        for side, found in counts.items():
            names = Counter()
            for launch in found.by_kind[kind]:
                names[launch.name] += launch.count
            listed = ", ".join(f"{name} {n}" if n > 1 else name for name, n in names.most_common())
            lines.append(f"    {side:8s}{sum(names.values()):4d}  x {found.times[kind]:2d}   {listed}")
    for side, found in counts.items():
        over = f"{found.moved / found.bound - 1:+.1%}"
        lines.append(
            f"  {side:8s}{found.launches:6d} launches a step; {found.moved / 1e9:.3f} GB moved, {over} of the bound "
            f"of {found.bound / 1e9:.3f} GB; {found.asked / 1e9:.3f} GB asked for"
        )
    if list(counts) == list(SIDES):
        ours, theirs = counts.values()
        lines.append(f"  {ours.launches / theirs.launches:.2f} of mlx-lm's launches")
    return lines


def listing(side: str, found: Count) -> list[str]:
    """Lines: every launch, in the order of the graph."""
    lines = []
    for kind, launches in found.by_kind.items():
        lines.append(f"  {side}, {kind}")
        for launch in launches:
            weights = " ".join(name for name in launch.inputs if not name.endswith((".scales", ".biases")))
            moved = f"{launch.read:>13,} {launch.written:>11,}"
            lines.append(f"    {launch.count} {launch.name:38s}{str(launch.shape):22s}{moved}  {weights}")
    return lines


def record(size: str, side: str, found: Count, context: int, rows: int, batch: int) -> dict[str, Any]:
    """One JSON line."""
    kinds = {kind: sum(launch.count for launch in launches) for kind, launches in found.by_kind.items()}
    return {
        "benchmark": "launches", "how": "counted in the traced graph, not run", "size": size, "side": side,
        "context": context, "rows": rows, "batch": batch, "launches": found.launches, "launches_by_kind": kinds,
        "arange": sum(found.times[k] * sum(a.name == "Arange" for a in v) for k, v in found.by_kind.items()),
        "bytes": found.moved, "bytes_asked": found.asked, "bytes_bound": found.bound,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", nargs="*", choices=geometry.SIZES, default=list(COUNTED))
    parser.add_argument("--side", nargs="*", choices=[*ALL_SIDES, *DENSE_SIDES], default=list(SIDES))
    parser.add_argument("--layers", type=int, default=8, help="that are traced; a multiple of 4 (8)")
    parser.add_argument("--context", type=int, default=4096, help="tokens in the cache (4096)")
    parser.add_argument("--rows", type=int, default=1, help="tokens of the step: a drawn one and drafted ones (1)")
    parser.add_argument("--batch", type=int, default=1, help="sequences, of up to --context tokens (1)")
    parser.add_argument("--list", action="store_true", help="every operation, with its bytes read and written")
    parser.add_argument("--out", type=Path, help="append JSON lines to this file")
    arguments = parser.parse_args()
    if arguments.layers % geometry.PERIOD or not arguments.layers:
        parser.error(f"--layers is {arguments.layers}: give a multiple of {geometry.PERIOD}")
    if DENSE_SIDES.keys() & {*arguments.side} and any("-A" in size for size in arguments.size):
        parser.error(f"--side {' and '.join(DENSE_SIDES)} go with dense sizes (--size 27B)")
    if arguments.batch > 1 and (arguments.rows > 1 or arguments.context < IN_TAIL * arguments.batch):
        parser.error(f"--batch goes with --rows 1 and a --context of {IN_TAIL} tokens a sequence or more")
    records = []
    with PretendedMetal():
        for size in arguments.size:
            how = size, arguments.layers, arguments.context, arguments.rows, arguments.batch
            counts = {side: count(side, *how) for side in arguments.side}
            print(*table(size, counts), sep="\n")
            if arguments.list:
                print(*(line for side, found in counts.items() for line in listing(side, found)), sep="\n")
            shape = arguments.context, arguments.rows, arguments.batch
            records += [record(size, side, found, *shape) for side, found in counts.items()]
    print()
    write(records, circumstances(), arguments.out)


if __name__ == "__main__":
    main()
