"""How many bytes a model takes in memory: weights by role, cache, and what a prompt needs while it is read.

Knows geometry, quantizations and the sizes of our own intermediate arrays. Reads nothing and asks no device.

The working memory of a prefill is modelled: the arrays of one layer that exist at once, counted in values a token. The
counts were fitted to mx.get_peak_memory() on the CPU in float32, over layers of many shapes, and are meant to be above
it: tests allow 1 to 4 times what is measured (8 where the CPU unpacks quantized weights), which itself varies with how
far MLX allocates ahead of its work. A GPU fuses more, unpacks nothing and needs less; that has not been measured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mlx_qwen35.cache.kv import KVFormat
from mlx_qwen35.checkpoint.inventory import KEPT_FLOAT32, Shape, text_tensors, vision_tensors
from mlx_qwen35.checkpoint.quantize import packed
from mlx_qwen35.config import ModelConfig, QuantSpec, TextConfig
from mlx_qwen35.kernels.gated_delta import has_own_form
from mlx_qwen35.kernels.lanes import lane_count
from mlx_qwen35.layers.attention import MOST_SCORES, ON_THE_WAY

CHUNK_SIZE = 2048  # tokens of a prompt that go through the model at once; model/model.py's own
CACHE_STEP = 256  # positions by which a KVCache grows; cache/kv.py's own
_SPARE = 1.25
_LAYERS_AHEAD = 4  # whose unpacked weights exist at once: MLX queues about a hundred operations; 3.7 layers were seen
_EXPERTS_AHEAD = 2 * lane_count()  # whose unpacked weights exist at once: one a core, and what is made on the way
_FLOAT_TAGS = ("F32", "F16", "BF16")

Specs = Mapping[str, QuantSpec | None]  # our module names -> their quantization


@dataclass(frozen=True)
class WeightBytes:
    """Bytes of the weights in memory. experts: the routed ones; trunk: all other layers; embedding: with the head.

    mtp: on the disk; it is read only where it is asked for (drafting.py) and does not count.
    """

    experts: int
    trunk: int
    embedding: int
    vision: int
    mtp: int

    @property
    def total(self) -> int:
        return self.experts + self.trunk + self.embedding + self.vision


def weight_bytes(config: ModelConfig, specs: Specs, itemsize: int, mtp: int = 0) -> WeightBytes:
    """itemsize: bytes of the dtype to compute in, as of scales."""
    roles = {"experts": 0, "trunk": 0, "embedding": 0, "vision": 0}
    for name, shape in (text_tensors(config) | vision_tensors(config)).items():
        roles[_role(name)] += tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), itemsize)
    return WeightBytes(**roles, mtp=mtp)


def expert_bytes(config: ModelConfig, specs: Specs, itemsize: int) -> tuple[int, ...]:
    """Of one expert in memory, for each layer that has experts; arguments as in weight_bytes."""
    layers: dict[str, int] = {}
    for name, shape in text_tensors(config).items():
        if _role(name) == "experts":
            layer = name.split(".")[1]
            size = tensor_bytes(name, shape, specs.get(name.removesuffix(".weight")), itemsize)
            layers[layer] = layers.get(layer, 0) + size // shape[0]
    return tuple(layers.values())


def tensor_bytes(name: str, shape: Shape, spec: QuantSpec | None, itemsize: int) -> int:
    """Of one of our weights in memory."""
    if spec is None:
        return math.prod(shape) * (4 if name.endswith(KEPT_FLOAT32) else itemsize)
    sizes = {"U32": 4, "U8": 1} | dict.fromkeys(_FLOAT_TAGS, itemsize)
    return sum(math.prod(part) * sizes[tags[0]] for part, tags in packed(shape, spec).values())


def cache_bytes(config: ModelConfig, itemsize: int, form: KVFormat | None = None) -> tuple[int, int]:
    """(bytes a token, bytes whatever the length) of a Cache of one sequence; form: of its keys and values."""
    text = config.text
    attention = text.layer_types.count("full_attention")
    deltas = len(text.layer_types) - attention
    state = 4 * text.linear_num_value_heads * text.linear_value_head_dim * text.linear_key_head_dim
    window = itemsize * (text.linear_conv_kernel_dim - 1) * _channels(text)
    values, fixed = attention * 2 * text.num_key_value_heads * text.head_dim, deltas * (state + window)
    if form is None:
        return values * itemsize, fixed
    packed = values * form.bits // 8 + values // form.group_size * 2 * itemsize
    return packed, fixed + -(-form.start // CACHE_STEP) * CACHE_STEP * values * itemsize


def cache_at(tokens: int, per_token: int, constant: int) -> int:
    """Bytes of a cache that holds `tokens`: it grows in steps."""
    return constant + per_token * -(-tokens // CACHE_STEP) * CACHE_STEP


def working_bytes(config: ModelConfig, specs: Specs, tokens: int, itemsize: int, *, gpu: bool) -> int:
    """What reading a prompt of `tokens` takes at most beside weights and cache; pictures are not in it."""
    chunk = min(tokens, CHUNK_SIZE)
    # A layer with experts is evaluated as it goes, so that no other layer's weights are there with its own.
    layers = 1 if config.text.moe else min(_LAYERS_AHEAD, len(config.text.layer_types))
    unpacked = layers * sum(_unpacked_bytes(config, specs, itemsize, gpu))
    mixer = _mixer_bytes(config.text, chunk, tokens, itemsize, gpu)
    layer = max(mixer, _feed_forward_bytes(config.text, chunk, itemsize)) + unpacked
    return int(_SPARE * (layer + _passing_bytes(config.text, chunk, itemsize)))


def mixing_bytes(config: ModelConfig, specs: Specs, tile: int, tokens: int, itemsize: int, *, gpu: bool) -> int:
    """What the mixer of a streamed layer takes for `tile` tokens at the end of a context of `tokens`."""
    mixer = _mixer_bytes(config.text, min(tile, tokens), tokens, itemsize, gpu)
    return int(_SPARE * (mixer + _unpacked_bytes(config, specs, itemsize, gpu)[0]))


def feeding_bytes(config: ModelConfig, specs: Specs, chunk: int, tokens: int, itemsize: int, *, gpu: bool) -> int:
    """What experts and all that goes on from layer to layer take for a chunk of a streamed prompt."""
    chunk = min(chunk, tokens)
    layer = _feed_forward_bytes(config.text, chunk, itemsize) + _unpacked_bytes(config, specs, itemsize, gpu)[1]
    return int(_SPARE * (layer + _passing_bytes(config.text, chunk, itemsize)))


def _unpacked_bytes(config: ModelConfig, specs: Specs, itemsize: int, gpu: bool) -> tuple[int, int]:
    """Of quantized weights that the CPU has unpacked at once: of a layer's mixer, and of what feeds forward."""
    if gpu or itemsize != 4:
        return 0, 0
    sizes: dict[tuple[str, bool], int] = {}
    for name, shape in text_tensors(config).items():
        if name.startswith("layers.") and specs.get(name.removesuffix(".weight")):
            experts = min(shape[0], _EXPERTS_AHEAD) * math.prod(shape[1:])
            key = name.split(".")[1], ".mlp." in name
            sizes[key] = sizes.get(key, 0) + 4 * (experts if _role(name) == "experts" else math.prod(shape))
    mixer, feeding = (max((n for (_, feeds), n in sizes.items() if feeds == which), default=0) for which in (0, 1))
    return mixer, feeding


def _mixer_bytes(text: TextConfig, chunk: int, tokens: int, itemsize: int, gpu: bool) -> int:
    """Of attention or a delta net over `chunk` tokens, the last of `tokens`."""
    most = 0
    if "full_attention" in text.layer_types:
        queries, keys = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
        tile = max(MOST_SCORES // ON_THE_WAY, 8 * text.num_attention_heads * tokens)
        scores = min(text.num_attention_heads * chunk * tokens, (ON_THE_WAY + 2) * tile)
        most = itemsize * (chunk * (9 * queries + 2 * keys) + scores)
    if "linear_attention" in text.layer_types:
        most = max(most, _delta_bytes(text, chunk, gpu))
    return most


def _feed_forward_bytes(text: TextConfig, chunk: int, itemsize: int) -> int:
    if text.moe is None:
        return itemsize * chunk * 6 * (text.intermediate_size or 0)
    moe, hidden = text.moe, text.hidden_size
    count = moe.experts_per_token * (4 * hidden + 3 * moe.intermediate_size)
    count += 6 * moe.shared_intermediate_size + 3 * moe.num_experts + 10 * hidden
    return itemsize * chunk * count


def _passing_bytes(text: TextConfig, chunk: int, itemsize: int) -> int:
    """Of what lives from layer to layer, and of one token's logits with what a sampler makes of them."""
    return itemsize * chunk * 10 * text.hidden_size + 4 * 8 * text.vocab_size


def _delta_bytes(text: TextConfig, chunk: int, gpu: bool) -> int:
    """Of a delta net's recurrence, which is float32 throughout."""
    heads, keys, values = text.linear_num_value_heads, text.linear_key_head_dim, text.linear_value_head_dim
    count = 3 * _channels(text) + 3 * heads * values
    own = has_own_form((text.linear_num_key_heads, keys), (heads, values), chunk, gpu=gpu)
    if own and not gpu:
        count += heads * values * keys  # MLX's form on the CPU keeps the state of every token
    elif not own:
        count += heads * (10 * keys + 7 * values + 4 * 16)
    return 4 * (chunk * count + 8 * heads * values * keys)


def _channels(text: TextConfig) -> int:
    return (
        2 * text.linear_num_key_heads * text.linear_key_head_dim
        + text.linear_num_value_heads * text.linear_value_head_dim
    )


def _role(name: str) -> str:
    if name.startswith("vision."):
        return "vision"
    if ".mlp.experts." in name:
        return "experts"
    return "embedding" if name.startswith(("embed_tokens.", "lm_head.")) else "trunk"
