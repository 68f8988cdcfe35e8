"""Large 4-bit checkpoints of real geometry with random weights, written at the speed of the disk.

Knows the sizes of the published mixtures of experts, MLX's layout of a checkpoint, and what 4 bits in groups of 64 look
like in a file. Knows neither MLX nor this package: the values are nobody's, but sizes and places are the real ones.
Every expert is another one, so that a wrong expert gives a wrong result.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.machine.system import is_mac
from tests.checkpoints import tensor_shapes, tiny_config

GROUP = 64  # weights of 4 bits that share a scale and a bias
SHARD_BYTES = 1 << 30  # of one file; less than the published 5 GB, so that a small checkpoint has several, too
_SPREAD = 4.61  # standard deviation of a random 4-bit code
_BLOCK = 1 << 22  # random numbers, made once and used again and again from another place
_SHIFTED = ("layernorm.weight", "q_norm.weight", "k_norm.weight", "model.norm.weight")  # stored as 1 + w

GEOMETRY: dict[str, dict[str, Any]] = {
    "35B": {"hidden_size": 2048, "num_attention_heads": 16, "linear_num_value_heads": 32, "num_experts": 256,
            "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512},
    "122B": {"hidden_size": 3072, "num_attention_heads": 32, "linear_num_value_heads": 64, "num_experts": 256,
             "num_experts_per_tok": 8, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024},
    "397B": {"hidden_size": 4096, "num_attention_heads": 32, "linear_num_value_heads": 64, "num_experts": 512,
             "num_experts_per_tok": 10, "moe_intermediate_size": 1024, "shared_expert_intermediate_size": 1024},
}  # fmt: skip
LAYERS = {"35B": 40, "122B": 48, "397B": 60}
_COMMON = {
    "head_dim": 256, "num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "vocab_size": 248320, "max_position_embeddings": 262144, "dtype": "bfloat16",
    "eos_token_id": 248044, "rope_parameters": {"mrope_section": [11, 11, 10], "partial_rotary_factor": 0.25},
}  # fmt: skip


def synthetic_config(size: str, layers: int, **overrides: Any) -> dict[str, Any]:
    """config.json of the text model of `size` (a key of GEOMETRY) cut to so many layers, beside a tiny vision tower.

    Every fourth layer has attention; of fewer layers the last. overrides: keys of the text configuration.
    The tower is there because mlx-vlm does not load an offloaded checkpoint without one.
    """
    every = min(4, layers)
    kinds = ["full_attention" if number % every == 0 else "linear_attention" for number in range(1, layers + 1)]
    text = {"layer_types": kinds, "full_attention_interval": every} | _COMMON | GEOMETRY[size] | overrides
    config = tiny_config("moe", vision=True, **text)
    how = {"group_size": GROUP, "bits": 4, "mode": "affine"}
    tokens = {"image_token_id": 248056, "video_token_id": 248057,
              "vision_start_token_id": 248053, "vision_end_token_id": 248054}  # fmt: skip
    return config | tokens | {"quantization": how, "quantization_config": how}


def expert_bytes(config: Mapping[str, Any]) -> int:
    """Of one expert: three matrices of packed codes, a scale and a bias of 2 bytes each for 64 of them."""
    weights = 3 * config["text_config"]["hidden_size"] * config["text_config"]["moe_intermediate_size"]
    return weights // 2 + 4 * weights // GROUP


def all_expert_bytes(config: Mapping[str, Any]) -> int:
    """Of all routed experts of all layers."""
    return expert_bytes(config) * config["text_config"]["num_experts"] * config["text_config"]["num_hidden_layers"]


def write_synthetic(folder: Path, config: Mapping[str, Any], *, plain_trunk: bool = False) -> Path:
    """Write the checkpoint of a synthetic_config(), and return the folder.

    plain_trunk: only the routed experts are quantized, everything else is bfloat16.
    A process of its own writes: the kernel counts what a parent once held among the memory of its children.
    """
    if is_mac():  # which does not count so
        _write(Path(folder), config, plain_trunk)
        return Path(folder)
    child = os.fork()
    if not child:
        status = 1
        try:
            _write(Path(folder), config, plain_trunk)
            status = 0
        finally:
            os._exit(status)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError(f"{folder} could not be written")
    return Path(folder)


@dataclass(frozen=True)
class _Tensor:
    """One tensor of a file. kind: "codes", "scales", "biases", or "plain" with values around `middle`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    spread: float
    middle: float = 0.0

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * {"U32": 4, "BF16": 2, "F32": 4}[self.dtype]


def _tensors(config: Mapping[str, Any], plain_trunk: bool) -> Iterator[_Tensor]:
    """Those of tensor_shapes() under MLX's names, in its shapes."""
    for name, shape in tensor_shapes(config).items():
        name = name.replace("model.language_model.", "language_model.model.")
        name = name.replace("lm_head", "language_model.lm_head")
        stem, _, last = name.rpartition(".experts.")
        if last == "gate_up_proj":
            experts, rows, columns = shape
            for part in ("gate_proj", "up_proj"):
                yield from _linear(f"{stem}.switch_mlp.{part}", (experts, rows // 2, columns), quantized=True)
        elif last == "down_proj":
            yield from _linear(f"{stem}.switch_mlp.down_proj", shape, quantized=True)
        elif ".visual." in name:
            name = name.replace("model.visual.", "vision_tower.")
            if name.endswith("patch_embed.proj.weight"):
                shape = (shape[0], *shape[2:], shape[1])
            yield _Tensor(name, "BF16", shape, "plain", 0.1)
        elif name.endswith("A_log"):
            yield _Tensor(name, "F32", shape, "plain", 1.0)
        elif name.endswith("dt_bias"):
            yield _Tensor(name, "BF16", shape, "plain", 1.0, -2.0)
        elif name.endswith("linear_attn.norm.weight"):
            yield _Tensor(name, "F32", shape, "plain", 0.3, 1.0)
        elif name.endswith(_SHIFTED):
            yield _Tensor(name, "BF16", shape, "plain", 0.3, 1.0)
        elif name.endswith("conv1d.weight"):
            yield _Tensor(name, "BF16", (shape[0], shape[2], 1), "plain", 0.5)
        else:
            yield from _linear(name.removesuffix(".weight"), shape, quantized=not plain_trunk)


def _linear(path: str, shape: tuple[int, ...], *, quantized: bool) -> Iterator[_Tensor]:
    """Weights whose outputs are about as large as their inputs; a router's are larger, to choose clearly."""
    gain = 3.0 if path.endswith("mlp.gate") else 1.0
    spread = 1.0 if "embed_tokens" in path else gain / np.sqrt(shape[-1])
    if not quantized:
        yield _Tensor(f"{path}.weight", "BF16", shape, "plain", spread)
        return
    yield _Tensor(f"{path}.weight", "U32", (*shape[:-1], shape[-1] // 8), "codes", spread)
    for kind in ("scales", "biases"):
        yield _Tensor(f"{path}.{kind}", "BF16", (*shape[:-1], shape[-1] // GROUP), kind, spread)


def _write(folder: Path, config: Mapping[str, Any], plain_trunk: bool) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    shards: list[list[_Tensor]] = [[]]
    for tensor in _tensors(config, plain_trunk):
        if sum(other.nbytes for other in shards[-1]) + tensor.nbytes > SHARD_BYTES and shards[-1]:
            shards.append([])
        shards[-1].append(tensor)
    blocks = _Blocks()
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {tensor.name: name for tensor in tensors}
        header, end = {"__metadata__": {"format": "mlx"}}, 0
        for tensor in tensors:
            header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape),
                                   "data_offsets": [end, end + tensor.nbytes]}  # fmt: skip
            end += tensor.nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(folder / name, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors:
                file.writelines(blocks.of(tensor))
    total = sum(tensor.nbytes for tensors in shards for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


class _Blocks:
    """Random numbers in each form, and a place in them for every tensor."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        self._codes = rng.integers(0, 1 << 32, _BLOCK, dtype=np.uint32)
        self._normal = rng.standard_normal(_BLOCK, dtype=np.float32)
        self._scale = 1 + 0.2 * np.clip(self._normal, -3, 3)  # never negative
        self._begin = 0

    def of(self, tensor: _Tensor) -> Iterator[memoryview]:
        """The bytes of a tensor, in pieces. A scale and its bias are made of the same number."""
        if tensor.kind != "biases":
            self._begin = (self._begin + 1_000_003) % (_BLOCK // 2)
        left = int(np.prod(tensor.shape))
        mine = slice(self._begin, self._begin + left)
        if tensor.kind == "codes":
            view = self._codes[mine]
        elif tensor.kind == "plain":
            view = tensor.middle + tensor.spread * self._normal[mine]
        else:
            view = (tensor.spread / _SPREAD) * self._scale[mine] * (1 if tensor.kind == "scales" else -7.5)
        if tensor.dtype == "BF16":
            view = (view.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
        elif tensor.dtype == "F32":
            view = view.astype(np.float32)
        while left:
            yield memoryview(view[:left]).cast("B")
            left -= min(left, len(view))
