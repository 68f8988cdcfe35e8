"""Every source times every target: convert, hold the files against the source, and let three loaders answer from them.

Knows convert()'s and load_model()'s public faces, and how mlx-lm and mlx-vlm are asked. `python -m tests.peers.matrix`
runs the whole product, which the tests run a part of.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_qwen35 import convert, load_model
from mlx_qwen35.config import BITS, GROUP_SIZES
from mlx_qwen35.conversion.recipes import RECIPES
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.vision import Media
from tests.checkpoints import KEPT_FLOAT32
from tests.peers import written
from tests.peers.sources import SOURCES, Shelf, Source
from tests.reference_numpy import Reference
from tests.reference_vision import SeeingReference

try:
    from mlx_lm.utils import load_model as load_in_mlx_lm
except ImportError:
    load_in_mlx_lm = None
try:
    from mlx_vlm.utils import load_model as load_in_mlx_vlm
except ImportError:
    load_in_mlx_vlm = None

TOLERANCE = 2e-3
STEPS = 2
WIDE = (*KEPT_FLOAT32, "linear_attn.dt_bias")  # float32 where the source has them so, whatever the rest is
IMAGE, START, END = 80, 82, 83
DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Target:
    """What convert() is asked for; spec: the default that config.json
    must then name where any module has it, None: any, or none.
    room: of a target size, in parts of the smallest that there is."""

    name: str
    arguments: dict[str, Any] = field(hash=False)
    spec: written.Spec | None
    room: float | None = None

    @property
    def searches(self) -> bool:
        return self.arguments.get("recipe") != "uniform"

    @property
    def quantizes(self) -> bool:
        return self.arguments.get("bits", 4) is not None

    @property
    def least(self) -> int:
        """The bits of a feed-forward map's gate_proj, which gets the fewest."""
        recipe = self.arguments.get("recipe", "")
        return int(recipe.split("_")[1]) if recipe.startswith("mixed_") else self.spec[0] if self.spec else 0


def _targets() -> dict[str, Target]:
    found = [Target("unquantized", {"bits": None}, None)]
    for mode in BITS:
        for bits, group in product(BITS[mode], GROUP_SIZES[mode]):
            name = f"{mode} {bits} x {group}" if mode == "affine" else mode
            arguments = {"bits": bits, "group_size": group, "mode": mode}
            if mode == "affine" and group != 64:  # those are mx.quantize's; the default looks for better scales
                arguments["recipe"] = "uniform"
            found.append(Target(name, arguments, (bits, group, mode)))
    for dtype in ("float16", "bfloat16", "float32"):
        found.append(Target(f"4 bits in {dtype}", {"dtype": dtype}, (4, 64, "affine")))
    for recipe in RECIPES:
        spec = None if recipe.startswith("mixed_") else (4, 64, "affine")
        found.append(Target(f"recipe {recipe}", {"recipe": recipe}, spec))
    found.append(Target("recipe uniform, mxfp8", {"recipe": "uniform", "mode": "mxfp8"}, (8, 32, "mxfp8")))
    found.append(Target("unquantized in bfloat16", {"bits": None, "dtype": "bfloat16"}, None))
    found.append(Target("a target size", {}, None, room=1.1))
    return {target.name: target for target in found}


TARGETS = _targets()


def some_pairs(part: int) -> list[tuple[str, str]]:
    """A part of the product in which every source meets one of `part` targets, and every target of the sources."""
    pairs = product(enumerate(SOURCES), enumerate(TARGETS))
    wanted = {("fp8 experts", "affine 4 x 64"), ("gptq experts", "affine 4 x 64"), ("bf16 experts", "affine 4 x 64")}
    return [(s, t) for (i, s), (j, t) in pairs if (i + j) % part == 0 or (s, t) in wanted]


@dataclass
class Prompt:
    tokens: list[int]
    media: list[Media]

    @cached_property
    def ids(self) -> mx.array:
        return mx.array([self.tokens])


def prompts(config: dict[str, Any], vision: bool) -> tuple[Prompt, Prompt | None]:
    """Words, and words with two pictures among them."""
    rng = np.random.RandomState(5)
    words = rng.randint(0, 80, 19).tolist()
    if not vision:
        return Prompt(words, []), None
    sizes = config["vision_config"]
    width = sizes["in_channels"] * sizes["temporal_patch_size"] * sizes["patch_size"] ** 2
    media = [
        Media("image", rng.standard_normal((h * w, width)).astype(np.float32), (1, h, w)) for h, w in ((4, 6), (2, 4))
    ]
    marks = [[START, *[IMAGE] * (m.grid[1] * m.grid[2] // 4), END] for m in media]
    return Prompt(words, []), Prompt([*words[:4], *marks[0], *words[4:6], *marks[1], *words[6:10]], media)


def check(source: Source, target: Target, folder: Path) -> Path:
    """One cell. Raises AssertionError, or whatever convert() or a loader raises."""
    try:
        out = convert(source.folder, folder, **target.arguments, **size(source, target))
    except CheckpointError as error:
        assert "is already an MLX checkpoint with what was asked for" in str(error) and source.raw is not None
        bulk = {spec for path, spec in source.packed.items() if path.endswith("mlp.gate_proj")}
        less = target.searches and all(mode == "affine" and bits <= target.least for bits, _, mode in bulk)
        assert bulk == {target.spec} or less
        return source.folder
    check_files(out, source, target)
    check_answers(out, source.vision)
    return out


def size(source: Source, target: Target) -> dict[str, int]:
    """The smallest is what the refusal of a smaller one names."""
    if target.room is None:
        return {}
    try:
        convert(source.folder, source.folder.with_name("none"), target_size=1)
    except CheckpointError as error:
        return {"target_size": int(target.room * int(str(error).split()[-2]))}
    raise AssertionError("a checkpoint of one byte")


def check_files(out: Path, source: Source, target: Target) -> None:
    """The folder's layout, and every value in it."""
    found = written.check_layout(out, source.folder, mtp=bool(source.mtp), vision=source.vision, asked=target.spec)
    assert bool(found.specs) == target.quantizes
    check_values(found, source, target)
    check_mtp(out, source, target)


def check_values(found: written.Written, source: Source, target: Target) -> None:
    """Every tensor is the source's own, or mx.quantize of it, or, where scales are searched, closer to it than that."""
    names = {name for name in found.tensors if not name.endswith((".scales", ".biases"))}
    assert names == source.meant.keys(), names ^ source.meant.keys()
    for name, meant in source.meant.items():
        path = name.removesuffix(".weight")
        if path not in found.specs:
            check_plain(name, found.tensors[name], meant, source, target)
            continue
        parts = [found.tensors.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
        had, spec = source.packed.get(path), found.specs[path]
        gptq = source.raw is None and had and had[0] == spec[0]
        if had and had[2] == spec[2] == "affine" and (target.searches or gptq):
            assert had == spec or spec[0] < had[0], f"{path} was {had} and became {spec}, which brings nothing back"
        steering = written.STEERING if target.room is None else written.CHOOSING
        assert spec[0] >= 8 or had == spec or not path.endswith(steering), f"{path} has {spec[0]} bits"
        if had != spec:
            kinds = {"float32", *source.kept, target.arguments.get("dtype", "float32")}
            known = packings(meant, spec, parts[1].dtype, kinds)
            searched = target.searches and spec[2] == "affine"
            exact = any(same(parts, packed) for packed in known)
            # A cast to `dtype` comes before the search: what it looks for is the cast values.
            seen = [np.array(mx.array(meant).astype(DTYPES[kind]).astype(mx.float32)) for kind in kinds]
            assert exact or (searched and any(no_worse(parts, known, values, spec) for values in seen)), path
        elif source.raw is not None:
            raw = [source.raw.get(f"{path}.{part}") for part in ("weight", "scales", "biases")]
            assert same(parts, cast(raw, parts[1].dtype, spec)), f"{path} was {spec} and is not the same any more"
        elif target.arguments.get("dtype", "float32") == "float32":
            assert np.array_equal(np.array(found.value(name)), meant), f"{path} was {spec} and is not exact"


def unpacked(parts: list[mx.array], spec: written.Spec) -> mx.array:
    weight, *line = (part if part.dtype == mx.uint32 else part.astype(mx.float32) for part in parts)
    return mx.dequantize(weight, *line, group_size=spec[1], bits=spec[0], dtype=mx.float32)


def error(value: mx.array, meant: np.ndarray) -> float:
    return float(np.square(np.array(value, dtype=np.float64) - meant).sum())


def packings(meant: np.ndarray, spec: written.Spec, dtype: mx.Dtype, kinds: set[str]) -> list[list[mx.array]]:
    """What mx.quantize makes of the values in each dtype of `kinds`, scales cast to `dtype` afterwards."""
    bits, group, mode = spec
    weights = [mx.array(meant).astype(DTYPES[kind]) for kind in kinds]
    return [cast(mx.quantize(weight, group, bits, mode=mode), dtype, spec) for weight in weights]


def cast(parts: Sequence[mx.array | None], dtype: mx.Dtype, spec: written.Spec) -> list[mx.array]:
    """Scales and biases of an affine quantization in another dtype."""
    weight, *others = (part for part in parts if part is not None)
    return [weight, *(part.astype(dtype) if spec[2] == "affine" else part for part in others)]


def same(parts: list[mx.array | None], packed: list[mx.array]) -> bool:
    given = [part for part in parts if part is not None]
    return len(given) == len(packed) and all(
        a.dtype == b.dtype and mx.array_equal(a, b).item() for a, b in zip(given, packed, strict=True)
    )


def no_worse(parts: list[mx.array], known: list[list[mx.array]], meant: np.ndarray, spec: written.Spec) -> bool:
    """Whether no group is further from the values than with mx.quantize's scales, as they are stored, or not much
    further where the search asks for no such thing (docs/QUANTIZATION.md), and all together are nearer."""
    bits, group, _ = spec
    assert [(part.dtype, part.shape) for part in parts] == [(part.dtype, part.shape) for part in known[0]]

    def lost(weight: mx.array, scales: mx.array, biases: mx.array) -> np.ndarray:
        scales, biases = (part.astype(mx.float32) for part in (scales, biases))
        value = np.float64(np.array(mx.dequantize(weight, scales, biases, group, bits)))
        return np.square(value - meant).reshape(-1, group).sum(-1)

    worst = np.maximum.reduce([lost(*packed) for packed in known])
    found = lost(*parts)
    most = 1.8 if bits in (2, 3, 4, 5) else 1 + 1e-5
    return bool((found <= worst * most + 1e-12).all() and found.sum() <= worst.sum())


def check_plain(name: str, found: mx.array, meant: np.ndarray, source: Source, target: Target) -> None:
    asked = target.arguments.get("dtype")
    allowed = {asked} if asked else set(source.kept)
    if name.endswith(WIDE):
        allowed = {"float32"} if name.endswith("A_log") else allowed | {"float32"}
    assert found.dtype in {DTYPES[dtype] for dtype in allowed}, f"{name}: {found.dtype}, expected {allowed}"
    wanted = mx.array(meant).astype(found.dtype)
    assert found.shape == wanted.shape and mx.array_equal(found, wanted).item(), name


def check_mtp(out: Path, source: Source, target: Target) -> None:
    """The MTP layer in a file of its own, and unquantized."""
    if not source.mtp:
        assert not (out / written.MTP).exists()
        return
    found, metadata = mx.load(str(out / written.MTP), return_metadata=True)
    assert metadata == {"format": "mlx"} and found.keys() == source.mtp.keys()
    for name, meant in source.mtp.items():
        check_plain(name, found[name], meant, source, target)


def check_answers(out: Path, vision: bool) -> None:
    """Logits of NumPy on the dequantized values, and of every loader, in float32."""
    found = written.read(out)
    values = written.as_published(found.values())
    rope = found.config["text_config"]["rope_parameters"]
    rope["rope_type"] = rope.get("rope_type") or rope["type"]  # mlx-lm renames it in what it writes
    words, shown = prompts(found.config, vision)
    text = {n.removeprefix("model.language_model."): v for n, v in values.items() if not n.startswith("model.visual.")}
    wanted = {"text": Reference(found.config["text_config"], text).logits(words.tokens)}
    wanted["text, step by step"] = wanted["text"][-STEPS:]
    if shown:
        wanted["pictures"] = SeeingReference(found.config, values).logits(shown.tokens, shown.media)
    assert all(np.abs(logits).max() > 0.1 for logits in wanted.values())
    for loader, answer in LOADERS.items():
        answers = answer(out, words, shown)
        assert answers.keys() == (wanted.keys() if loader != "mlx-lm" else wanted.keys() - {"pictures"})
        for what, logits in answers.items():
            off = np.abs(np.array(logits) - wanted[what]).max()
            assert off <= TOLERANCE, f"{loader} is off by {off:.1e}: {what}"


Answers = dict[str, mx.array]


def stepped(model: Callable[..., mx.array], cache: Any, ids: mx.array) -> mx.array:
    """Logits [STEPS, vocab] of the last tokens one by one, after the others at once."""
    cut = ids.shape[1] - STEPS
    model(ids[:, :cut], cache=cache)
    return mx.concatenate([model(ids[:, n : n + 1], cache=cache)[0] for n in range(cut, cut + STEPS)])


def ours(out: Path, words: Prompt, shown: Prompt | None) -> Answers:
    model = load_model(out, dtype="float32")
    found = {"text": model(words.ids)[0], "text, step by step": stepped(model, model.make_cache(), words.ids)}
    return found | ({"pictures": model(shown.ids, None, shown.media)[0]} if shown else {})


def mlx_lm(out: Path, words: Prompt, shown: Prompt | None) -> Answers:
    model, _ = load_in_mlx_lm(out)
    model.set_dtype(mx.float32)
    return {"text": model(words.ids)[0], "text, step by step": stepped(model, model.make_cache(), words.ids)}


class Float32(nn.Module):
    """An embedding in an mx mode comes out in bfloat16, and mlx-vlm casts what follows to that: the features of
    pictures, and position by position the cosines. The model is to compute in float32."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding, self.as_linear = embedding, embedding.as_linear

    def __call__(self, ids: mx.array) -> mx.array:
        return self.embedding(ids).astype(mx.float32)


def mlx_vlm(out: Path, words: Prompt, shown: Prompt | None) -> Answers:
    model = load_in_mlx_vlm(out)
    model.set_dtype(mx.float32)
    inner = model.language_model
    inner.model.embed_tokens = Float32(inner.model.embed_tokens)
    found = {"text": model(words.ids).logits[0]}
    found["text, step by step"] = stepped(lambda *a, **k: inner(*a, **k).logits, inner.make_cache(), words.ids)
    if shown:
        rows = mx.array(np.concatenate([media.pixels for media in shown.media]))
        grids = mx.array([media.grid for media in shown.media])
        found["pictures"] = model(shown.ids, pixel_values=rows, image_grid_thw=grids).logits[0]
    return found


LOADERS: dict[str, Callable[[Path, Prompt, Prompt | None], Answers]] = {"this package": ours}
if load_in_mlx_lm is not None:
    LOADERS["mlx-lm"] = mlx_lm
if load_in_mlx_vlm is not None:
    LOADERS["mlx-vlm"] = mlx_vlm


def main() -> int:
    mx.set_default_device(mx.cpu)
    failed, started = 0, time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder))
        cells = list(product(SOURCES, TARGETS))
        for number, (source, target) in enumerate(cells):
            try:
                check(shelf[source], TARGETS[target], Path(folder) / f"out{number}")
            except Exception as error:
                failed += 1
                print(f"{source} -> {target}: {type(error).__name__}: {str(error).splitlines()[0]}", flush=True)
    print(f"{len(cells) - failed} of {len(cells)} cells hold in {', '.join(LOADERS)}; "
          f"{time.perf_counter() - started:.0f} s")  # fmt: skip
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
