"""How long the parts of a layer take: this package's beside mlx-lm's, with the same weights and the same input.

    python benchmarks/kernels.py [--rows 1 128] [--context 256] [--rounds 5] [--out FILE]

Both projects load the same checkpoint into this process; a part is the delta net, the attention, the experts or the
dense feed-forward of one layer, or the head. With one row, a part is called for 16 tokens one after the other, and the
figure is that of one; its cache holds --context tokens before. With more, its cache is empty. What both make of the
first input is compared before anything is timed, and a part that differs by more than a hundredth is an error (a
twentieth in 16 bits). Knows how both call their parts. Knows nothing of how they work.
Prints a table, and one JSON line per part and rows, as METHODOLOGY.md describes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]

import mlx.core as mx  # noqa: E402

from benchmarks import sides  # noqa: E402
from benchmarks.measuring import circumstances, compared, in_turns, spread, write  # noqa: E402

STEPS = 16  # tokens one after the other, of which a figure for one row is the mean
Call = Callable[[mx.array], mx.array]


@dataclass(frozen=True)
class Part:
    """One part of a model on both sides: a function that makes a fresh cache of so many tokens and returns the call."""

    name: str
    case: str
    ours: Callable[[int], Call]
    theirs: Callable[[int], Call]


class Models:
    """A checkpoint, loaded twice."""

    def __init__(self, case: str, folder: Path):
        from mlx_lm.utils import load_model as load_theirs

        from mlx_qwen35.checkpoint.load import load_model

        checkpoint = sides.checkpoint(sides.CASES[case], folder)
        self.ours = load_model(checkpoint)
        theirs, _ = load_theirs(checkpoint, lazy=True)
        if mx.default_device() == mx.cpu:
            theirs.set_dtype(mx.float32)
        mx.eval(theirs.parameters())
        self.theirs = theirs.language_model
        self.hidden = self.ours.config.text.hidden_size
        self.dtype = self.ours.norm.weight.dtype

    def input(self, rows: int, seed: int = 0) -> mx.array:
        """[1, rows, H], as large as what a norm gives."""
        x = mx.random.normal((1, rows, self.hidden), key=mx.random.key(seed)).astype(self.dtype)
        mx.eval(x)
        return x

    def layer(self, kind: str) -> int:
        return self.ours.config.text.layer_types.index(kind)

    def delta_net(self, case: str) -> Part:
        from mlx_lm.models.cache import ArraysCache

        from mlx_qwen35.cache import DeltaState

        number = self.layer("linear_attention")
        mine, theirs = self.ours.layers[number].linear_attn, self.theirs.model.layers[number].linear_attn

        def ours(context: int) -> Call:
            state = DeltaState()
            return self._after(context, lambda x: mine(x, state))

        def peer(context: int) -> Call:
            state = ArraysCache(2)
            return self._after(context, lambda x: theirs(x, None, state))

        return Part("delta net", case, ours, peer)

    def attention(self, case: str) -> Part:
        from mlx_lm.models.base import create_attention_mask
        from mlx_lm.models.cache import KVCache as TheirCache

        from mlx_qwen35.cache import KVCache

        number = self.layer("full_attention")
        mine, theirs = self.ours.layers[number].self_attn, self.theirs.model.layers[number].self_attn

        def ours(context: int) -> Call:
            cache = KVCache()

            def call(x: mx.array) -> mx.array:
                positions = mx.arange(cache.offset, cache.offset + x.shape[1])[None]
                return mine(x, self.ours._rope(positions), cache)

            return self._after(context, call)

        def peer(context: int) -> Call:
            cache = TheirCache()
            return self._after(context, lambda x: theirs(x, create_attention_mask(x, cache), cache))

        return Part("attention", case, ours, peer)

    def feed_forward(self, case: str, name: str) -> Part:
        mine, theirs = self.ours.layers[0].mlp, self.theirs.model.layers[0].mlp
        return Part(name, case, lambda _: mine, lambda _: theirs)

    def head(self, case: str) -> Part:
        tied = self.ours.config.text.tie_word_embeddings
        theirs = self.theirs.model.embed_tokens.as_linear if tied else self.theirs.lm_head
        return Part("head", case, lambda _: self.ours.head, lambda _: theirs)

    def _after(self, context: int, call: Call) -> Call:
        if context:
            mx.eval(call(self.input(context, seed=1)))
        return call


def seconds(make: Callable[[int], Call], x: mx.array, context: int) -> float:
    """Of one call; with one row, the mean over STEPS tokens that follow one another."""
    alone = x.shape[1] == 1
    call = make(context if alone else 0)
    times = STEPS if alone else 1
    start = time.perf_counter()
    for _ in range(times):
        mx.eval(call(x))
    return (time.perf_counter() - start) / times


def difference(part: Part, x: mx.array, context: int) -> float:
    """The largest of what both sides' outputs are apart, in standard deviations of one's."""
    outputs = []
    for make in (part.ours, part.theirs):
        outputs.append(make(context if x.shape[1] == 1 else 0)(x).astype(mx.float32).reshape(-1))
        mx.eval(outputs[-1])
    return (mx.abs(outputs[0] - outputs[1]).max() / mx.std(outputs[1])).item()


def measure(models: Models, parts: list[Part], rows: list[int], context: int, rounds: int) -> list[dict[str, Any]]:
    """A record a part and number of rows. Raises SystemExit where the sides compute different things."""
    most = 0.05 if models.dtype != mx.float32 else 0.01
    records = []
    for part in parts:
        for count in rows if part.name != "head" else [1]:
            x = models.input(count)
            apart = difference(part, x, context)
            if not apart <= most:
                raise SystemExit(f"{part.name}, {count} rows: the sides are {apart:.2g} of a standard deviation apart")
            turns = [lambda make=make, x=x: seconds(make, x, context) for make in (part.ours, part.theirs)]
            pairs = in_turns(turns, rounds)
            quantity = f"{part.name}, {count} row{'s' if count > 1 else ''}"
            more = {"case": part.case, "peer": "mlx-lm", "context": context, "apart": apart}
            records.append(compared("kernels", quantity, "s", pairs, **more))
    return records


def main() -> None:
    parser = sides.arguments(__doc__.splitlines()[0], 5, ("35B-4-layers", "0.8B-8-layers"))
    parser.add_argument("--rows", nargs="*", type=int, default=[1, 128])
    parser.add_argument("--context", type=int, default=256, help="tokens before a single one (256)")
    arguments = parser.parse_args()
    around = circumstances()
    records = []
    for case in arguments.case:
        models = Models(case, arguments.folder)
        moe = models.ours.config.text.moe is not None
        parts = [models.delta_net(case), models.attention(case)]
        parts += [models.feed_forward(case, "experts" if moe else "dense")] + ([] if moe else [models.head(case)])
        records += measure(models, parts, arguments.rows, arguments.context, arguments.rounds)
        del models, parts
        mx.clear_cache()
    print(f"{'seconds':34s}{'ours':>32s}{'mlx-lm':>32s}   theirs / ours")
    for made in records:
        cells = "".join(f"{spread(made[side], '.5f'):>32s}" for side in ("ours", "theirs"))
        print(f"{made['case'] + ': ' + made['quantity']:34s}{cells}   {spread(made['ratio'], '.2f')}")
    write(records, around, arguments.out)


if __name__ == "__main__":
    main()
