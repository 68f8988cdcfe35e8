"""LoRA adapters: a folder as mlx-lm, mlx-vlm or PEFT writes it, put on a model, merged into its weights, or written.

Knows adapter_config.json, the names in adapters.safetensors and the arithmetic of low-rank updates. Knows nothing of
training. What PEFT writes, peft.py puts into these terms.

    lora    y = W x + scale * B A x
    dora    the same, each row of the sum brought to a learned length m
    full    whole weights of some layers, which replace those of the model

The names are mlx-lm's ("language_model.model.layers.0.self_attn.q_proj.lora_a"), or those of this package's modules,
which mlx-lm's trainer writes when it trains a model of ours.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_qwen35.checkpoint import peft
from mlx_qwen35.checkpoint.inventory import Shape, is_linear, text_tensors
from mlx_qwen35.checkpoint.names import TARGET
from mlx_qwen35.checkpoint.quantize import pack, unpack
from mlx_qwen35.config import ModelConfig, QuantSpec
from mlx_qwen35.errors import CheckpointError
from mlx_qwen35.experts.linear import ExpertLinear, QuantizedExpertLinear
from mlx_qwen35.model import Model

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_FILES = (WEIGHTS, "weights.safetensors")  # mlx-vlm writes the second too
_PEFT = "adapter_model.safetensors"
KINDS = ("lora", "dora", "full")
EMBEDDING = "embed_tokens"
_LEAVES = ("lora_a", "lora_b", "m")

Update = Callable[[mx.array, int, int], mx.array]


@dataclass(frozen=True)
class Adapter:
    """What a folder holds.

    tensors: by our module, then by leaf (lora_a, lora_b, m); of kind "full": by our weight, {"": whole}.
    rank, scale, dropout: as trained; rank is None for "full", and where modules have ranks of their own.
    scales: of modules that have their own; whole: our weights that are replaced besides. files: that it lies in.
    peft: adapter_config.json and tensors of PEFT's, which fitted() puts into these terms.
    """

    folder: Path
    kind: str
    tensors: dict[str, dict[str, mx.array]]
    rank: int | None = None
    scale: float = 1.0
    dropout: float = 0.0
    scales: Mapping[str, float] = field(default_factory=dict)
    whole: Mapping[str, mx.array] = field(default_factory=dict)
    files: tuple[Path, ...] = ()
    peft: tuple[Mapping[str, Any], Mapping[str, mx.array]] | None = None

    def scale_of(self, module: str) -> float:
        """By which a module's update is multiplied."""
        return self.scales.get(module, self.scale)


def read_adapter(folder: str | Path) -> Adapter:
    """Raises CheckpointError if a file is missing or damaged, or is no adapter of mlx-lm's, mlx-vlm's or PEFT's."""
    folder = Path(folder).expanduser()
    config = _config(folder)
    if (folder / _PEFT).is_file() and not (folder / WEIGHTS).is_file():
        values = _values(folder / _PEFT)
        return Adapter(folder, "lora", {}, files=(folder / CONFIG, folder / _PEFT), peft=(config, values))
    if "alpha" in config and "lora_parameters" not in config:
        config = _of_mlx_vlm(config, folder)
    kind = config.get("fine_tune_type", "lora")
    if kind not in KINDS:
        raise CheckpointError(f"{folder / CONFIG}: fine_tune_type is {kind!r}; it must be one of {', '.join(KINDS)}")
    path = next((folder / name for name in _FILES if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has no {WEIGHTS}: give the folder that the trainer wrote")
    values, files = _values(path), (folder / CONFIG, path)
    tensors: dict[str, dict[str, mx.array]] = {}
    for name, value in values.items():
        module, leaf = _ours(name, kind)
        tensors.setdefault(module, {})[leaf] = value
    if not tensors:
        raise CheckpointError(f"{path} is empty: train the adapter again")
    if kind == "full":
        return Adapter(folder, kind, tensors, files=files)
    for module, leaves in tensors.items():
        due = _LEAVES if kind == "dora" else _LEAVES[:2]
        wrong = sorted({*due} ^ {*leaves})
        if wrong:
            state = "is missing" if wrong[0] in due else f"is nothing that a {kind} adapter has"
            raise CheckpointError(f"{path}: {module}.{wrong[0]} {state}; train or copy the adapter again")
    return Adapter(folder, kind, tensors, *_parameters(config, folder), files=files)


def fitted(adapter: Adapter, config: ModelConfig) -> Adapter:
    """The adapter of a model of this config, in our terms; raises CheckpointError where one of PEFT's is not of it, or
    is not read."""
    if adapter.peft is None:
        return adapter
    try:
        found = peft.translate(*adapter.peft, text_tensors(config))
    except ValueError as problem:
        raise CheckpointError(
            f"the adapter {adapter.folder} (PEFT): {problem}. Give it with the model that its adapter_config.json names"
        ) from None
    mx.eval(found.tensors, found.whole)  # threads go on with them, and MLX's streams are each thread's own
    return replace(adapter, tensors=found.tensors, scales=found.scales, whole=found.whole, rank=None, peft=None)


def _values(path: Path) -> dict[str, mx.array]:
    try:
        values = mx.load(str(path))
        mx.eval(values)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); copy the adapter again") from error
    for name, value in values.items():
        if not mx.all(mx.isfinite(value)).item():
            raise CheckpointError(f"{path}: {name} holds NaN or infinite values; train the adapter again")
    return values


def _of_mlx_vlm(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """mlx-vlm's older configuration, in which rank, alpha and dropout stand by themselves."""
    rank, alpha = config.get("rank"), config.get("alpha")
    if type(rank) is not int or rank < 1 or isinstance(alpha, bool) or not isinstance(alpha, (int, float)):
        raise CheckpointError(f"{folder / CONFIG}: rank is {rank!r:.40} and alpha {alpha!r:.40}; write what they were")
    parameters = {"rank": rank, "scale": alpha / rank, "dropout": config.get("dropout", 0.0)}
    return {**config, "lora_parameters": parameters}


def load_adapter(model: Model, adapter: str | Path | Adapter) -> Model:
    """Puts an adapter (or that of a folder) on a model, in place, and returns it. The model may be quantized.

    Raises CheckpointError, and leaves the model as it was, if tensors do not fit it; the first are named.
    """
    _check_alone(model)
    adapter = adapter if isinstance(adapter, Adapter) else read_adapter(adapter)
    if any(hasattr(module, "lora_a") for module in model.modules()):
        raise CheckpointError("the model has an adapter already; fuse it, or load the model again")
    adapter = fitted(adapter, model.config)
    check_loadable(adapter, model.config)
    return put_on(model, adapter)


def put_on(model: Model, adapter: Adapter) -> Model:
    """The same for an adapter that is known to fit, or a share of one (parallel/adapted.py)."""
    if adapter.kind == "full":
        return _replace_weights(model, adapter, {name: leaves[""] for name, leaves in adapter.tensors.items()})
    if adapter.whole:
        _replace_weights(model, adapter, adapter.whole)
    modules = dict(model.named_modules())
    adapted = [(name, _adapted(modules[name], adapter, name)) for name in adapter.tensors]
    model.update_modules(tree_unflatten(adapted))
    return model


def updates(adapter: Adapter, config: ModelConfig) -> dict[str, Update]:
    """How each weight that an adapter changes is made from the old one, rows start..stop of it at a time, in float32.

    Raises CheckpointError if the adapter does not fit a model of this config.
    """
    adapter = fitted(adapter, config)
    check_fit(adapter, config)
    if adapter.kind == "full":
        return {name: partial(_replaced, leaves[""]) for name, leaves in adapter.tensors.items()}
    made: dict[str, Update] = {name: partial(_replaced, value) for name, value in adapter.whole.items()}
    for module, leaves in adapter.tensors.items():
        update = partial(_updated, leaves, adapter.scale_of(module), module == EMBEDDING)
        before = made.get(f"{module}.weight")
        made[f"{module}.weight"] = update if before is None else partial(_after, before, update)
    return made


def check_loadable(adapter: Adapter, config: ModelConfig) -> None:
    """`check_fit`, and raises CheckpointError where mlx-lm is missing, whose layers an adapter needs."""
    check_fit(adapter, config)
    if adapter.kind != "full" and find_spec("mlx_lm") is None:
        raise CheckpointError(
            "an adapter beside the weights takes layers of mlx-lm, which is not installed: pip install mlx-lm, or "
            "merge it first (mlx-qwen35 convert --adapter-path)"
        )


def check_fit(adapter: Adapter, config: ModelConfig) -> None:
    """Raises CheckpointError that names the first tensors which do not fit a model of this config."""
    adapter, shapes = fitted(adapter, config), text_tensors(config)
    wrong = []
    for name, leaves in adapter.tensors.items():
        due = _due(name, shapes, adapter, leaves)
        if due is None:
            what = "weight" if adapter.kind == "full" else "linear map that takes one"
            wrong.append(f"{name}: the model has no {what} of this name")
            continue
        wrong += [
            f"{name}{'.' if leaf else ''}{leaf} is {list(value.shape)}, the model needs {list(due[leaf])}"
            for leaf, value in leaves.items()
            if value.shape != due[leaf]
        ]
    if wrong:
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(
            f"the adapter {adapter.folder} was trained on another model: {'; '.join(wrong[:3])}{more}. Give it with "
            "the model that its adapter_config.json names"
        )


def fuse(model: Model) -> Model:
    """Merges the adapter that a model carries into its weights, in place, and returns it: no adapter is left.

    Computed in float32. A quantized weight is dequantized, changed and quantized again as it was: that rounds, and what
    the adapter changes by less than half a step of the grid is lost. Fuse into an unquantized model where that counts.
    """
    _check_alone(model)
    fused = []
    for name, module in model.named_modules():
        if not hasattr(module, "lora_a"):
            continue
        base = module.embedding if hasattr(module, "embedding") else module.linear
        if "factors" in base or "signs" in base:
            raise CheckpointError(
                f"{name} is packed in a form into which MLX cannot pack a merged weight: convert the checkpoint with "
                "the adapter (adapter_path=), which starts from exact values"
            )
        spec = QuantSpec(base.bits, base.group_size, base.mode) if hasattr(base, "bits") else None
        held = {kind: base[kind] for kind in ("weight", "scales", "biases") if base.get(kind) is not None}
        weight = unpack(held, spec) if spec else base.weight.astype(mx.float32)
        leaves = {leaf: module[leaf] for leaf in _LEAVES if leaf in module}
        weight = merged(weight, leaves, module.scale, embedding=hasattr(module, "embedding"))
        packed = pack(weight, spec) if spec else {"weight": weight}
        for kind, value in packed.items():
            base[kind] = value.astype(held[kind].dtype)
        mx.eval([base[kind] for kind in packed])
        fused.append((name, base))
    model.update_modules(tree_unflatten(fused))
    return model


def merged(
    weight: mx.array, leaves: Mapping[str, mx.array], scale: float, *, embedding: bool = False
) -> mx.array:
    """A float32 weight [.., out, in] with its low-rank update; [E, out, in] for experts, [vocab, H] for an embedding.

    lora_a, lora_b: [in, r] and [r, out], for experts [E, r, in] and [E, out, r], for an embedding [vocab, r], [r, H].
    """
    a, b = (leaves[leaf].astype(mx.float32) for leaf in ("lora_a", "lora_b"))
    if weight.ndim == 3:
        update = b @ a
    else:
        update = a @ b if embedding else (a @ b).T
    weight = weight + scale * update
    if "m" in leaves:
        weight = (leaves["m"].astype(mx.float32) / mx.linalg.norm(weight, axis=1))[:, None] * weight
    return weight


def save_adapter(model: Model, folder: str | Path, *, base: str | Path = "") -> Path:
    """Writes the adapter that a model carries (mlx-lm's trainer has put it there) as mlx-lm reads it; -> the folder.

    base: what adapter_config.json says the model was. Raises CheckpointError if the model has no LoRA or DoRA layers.
    """
    _check_alone(model)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_a")}
    if not layers:
        raise CheckpointError("the model has no adapter; train one with mlx-lm's linear_to_lora_layers and train")
    folder = Path(folder).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{_published(name)}.{leaf}": module[leaf]
        for name, module in layers.items()
        for leaf in _LEAVES
        if leaf in module
    }
    mx.save_safetensors(str(folder / WEIGHTS), tensors, {"format": "mlx"})
    one = next(iter(layers.values()))
    dora = any("m" in module for module in layers.values())
    numbers = [int(name.split(".")[1]) for name in layers if name.startswith("layers.")]
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "model": str(base),
        "num_layers": len(model.layers) - min(numbers, default=len(model.layers)),
        "lora_parameters": {
            "rank": one.lora_a.shape[1],
            "scale": one.scale,
            "dropout": 1 - one.dropout._p_1,
            "keys": sorted({_key(_published(name)) for name in layers}),
        },
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=4) + "\n", encoding="utf-8")
    return folder


def _check_alone(model: Model) -> None:
    """Raises CheckpointError where other ranks have parts of the model, which nothing here would reach."""
    if getattr(model, "ranks_told", None) is not None:
        raise CheckpointError(
            "the model is on ranks, which take an adapter when they load: load(..., ranks=, adapter_path=). To merge "
            "or write one, load the model without ranks"
        )


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / CONFIG).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{folder} has no {CONFIG}: give the folder that the trainer wrote") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be read ({error}); copy the adapter again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{folder / CONFIG} holds no JSON object; copy the adapter again")
    return config


def _parameters(config: Mapping[str, Any], folder: Path) -> tuple[int, float, float]:
    """rank, scale and dropout of adapter_config.json."""
    given = config.get("lora_parameters")
    given = given if isinstance(given, dict) else {}
    values = given.get("rank"), given.get("scale"), given.get("dropout", 0.0)
    for name, value in zip(("rank", "scale", "dropout"), values, strict=True):
        whole = name != "rank" or isinstance(value, int)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not whole:
            raise CheckpointError(f"{folder / CONFIG}: lora_parameters.{name} is {value!r}; write the number it had")
    return values


def _ours(name: str, kind: str) -> tuple[str, str]:
    """-> (our module, leaf) of an adapter's tensor, or (our tensor, "") of a whole weight."""
    (ours,) = (TARGET.ours(name) or (name,))[:1]
    if kind == "full":
        return ours, ""
    module, _, leaf = ours.rpartition(".")
    return module, {"A": "lora_a", "B": "lora_b"}.get(leaf, leaf)  # mlx-vlm's older names


def _published(module: str) -> str:
    """mlx-lm's name of one of our modules."""
    return TARGET.source(f"{module}.weight").names[0].removesuffix(".weight")


def _key(published: str) -> str:
    """How mlx-lm's lora_parameters.keys name a module: from its layer on, or whole."""
    head, layers, rest = published.partition(".layers.")
    return rest.partition(".")[2] if layers else head


def _due(
    name: str, shapes: Mapping[str, Shape], adapter: Adapter, leaves: Mapping[str, mx.array]
) -> dict[str, Shape] | None:
    """What each leaf of an adapter's entry has to be; None where there can be no such entry."""
    if adapter.kind == "full":
        return {"": shapes[name]} if name in shapes else None
    weight, rank = f"{name}.weight", adapter.rank or leaves["lora_a"].shape[1]
    if weight not in shapes or not is_linear(weight, shapes[weight]):
        return None
    *experts, outer, inner = shapes[weight]
    if experts and (adapter.kind == "dora" or "m" in leaves):  # mlx-lm has none for them
        return None
    if experts:
        return {"lora_a": (*experts, rank, inner), "lora_b": (*experts, outer, rank)}
    if name == EMBEDDING:
        return {"lora_a": (outer, rank), "lora_b": (rank, inner), "m": (outer,)}
    return {"lora_a": (inner, rank), "lora_b": (rank, outer), "m": (outer,)}


def _updated(
    leaves: Mapping[str, mx.array], scale: float, embedding: bool, weight: mx.array, start: int, stop: int
) -> mx.array:
    """Rows start..stop of a weight (experts of a stack) with their part of the update."""
    experts = weight.ndim == 3
    by_row = ("lora_a", "lora_b") if experts else ("lora_a", "m") if embedding else ("m",)
    rows = {leaf: value[start:stop] if leaf in by_row else value for leaf, value in leaves.items()}
    if not experts and not embedding:
        rows["lora_b"] = rows["lora_b"][:, start:stop]
    return merged(weight, rows, scale, embedding=embedding)


def _replaced(whole: mx.array, weight: mx.array, start: int, stop: int) -> mx.array:
    return whole[start:stop].astype(mx.float32)


def _after(first: Update, then: Update, weight: mx.array, start: int, stop: int) -> mx.array:
    return then(first(weight, start, stop), start, stop)


def _adapted(base: nn.Module, adapter: Adapter, name: str) -> nn.Module:
    """mlx-lm's layer around ours, with the adapter's tensors in it."""
    leaves = adapter.tensors[name]
    if "m" in leaves and ("factors" in base or "signs" in base):  # mlx-lm's layer would take its weights without them
        raise CheckpointError(
            f"{name} is packed in a form that DoRA is not computed with: convert the checkpoint with the adapter "
            "(adapter_path=)"
        )
    made = _wrapper(base, "dora" if "m" in leaves else "lora")
    layer = made(base, r=leaves["lora_a"].shape[1], dropout=adapter.dropout, scale=adapter.scale_of(name))
    for leaf, value in leaves.items():
        layer[leaf] = value
    layer.eval()
    return layer


def _wrapper(base: nn.Module, kind: str) -> Callable[..., nn.Module]:
    from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    if isinstance(base, (ExpertLinear, QuantizedExpertLinear)):
        return LoRASwitchLinear.from_base
    if isinstance(base, (nn.Embedding, nn.QuantizedEmbedding)):
        return DoRAEmbedding.from_base if kind == "dora" else LoRAEmbedding.from_base
    return DoRALinear.from_base if kind == "dora" else LoRALinear.from_base


def _replace_weights(model: Model, adapter: Adapter, new: Mapping[str, mx.array]) -> Model:
    own = dict(tree_flatten(model.parameters()))
    packed = next((name for name in new if not mx.issubdtype(own[name].dtype, mx.floating)), None)
    if packed:
        raise CheckpointError(
            f"the adapter {adapter.folder} holds all of {packed}, which is quantized in this model: load the "
            "unquantized model, or convert it with the adapter (adapter_path=)"
        )
    model.load_weights([(name, value.astype(own[name].dtype)) for name, value in new.items()], strict=False)
    return model
