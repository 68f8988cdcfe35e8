"""Random block drafters in the form of published ones, and one that is right as often as it is told to be.

Knows config.json, and names and shapes of the tensors as they are published. For targets of tests.checkpoints.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_qwen35.blocks.config import BlockConfig
from mlx_qwen35.blocks.drafter import BlockDraftModel

SELECTING = {"conv_kernel_size": 2, "conv_group_size": 16, "selector_rank": 10, "selector_top_k": 7}
TAPS = [0, 3]


def published(kind: str = "DFlash", *, section: dict[str, Any] | None = None, **overrides: Any) -> dict[str, Any]:
    """config.json, in which no two sizes that could be confused are equal. section: more of dflash_config."""
    told = {"mask_token_id": 90, "target_layer_ids": TAPS, **(section or {})}
    config = {
        "architectures": [f"{kind}DraftModel"],
        "attention_bias": False,
        "dtype": "bfloat16",
        "head_dim": 40,
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 224,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "num_target_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "sliding_window": 12,
        "vocab_size": 96,
    }
    if kind == "DFlash2":
        theta = config.pop("rope_theta")
        told = {"block_size": 8, **SELECTING, **told}
        config |= {"rope_parameters": {"rope_type": "default", "rope_theta": theta}, "is_causal": False}
    else:
        config["block_size"] = 16
    return {**config, "dflash_config": told, **overrides}


def tensors(config: dict[str, Any], seed: int = 3) -> dict[str, np.ndarray]:
    """Under the published names."""
    rng, told = np.random.default_rng(seed), config["dflash_config"]
    hidden, inner, dim = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (hidden, len(told["target_layer_ids"]) * hidden),
        "hidden_norm.weight": (hidden,),
        "norm.weight": (hidden,),
    }
    for number in range(config["num_hidden_layers"]):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.q_proj.weight": (queries, hidden),
            "self_attn.k_proj.weight": (keys, hidden),
            "self_attn.v_proj.weight": (keys, hidden),
            "self_attn.o_proj.weight": (hidden, queries),
            "self_attn.q_norm.weight": (dim,),
            "self_attn.k_norm.weight": (dim,),
            "mlp.gate_proj.weight": (inner, hidden),
            "mlp.up_proj.weight": (inner, hidden),
            "mlp.down_proj.weight": (hidden, inner),
        }
        if told.get("attention_sink_bias"):
            layer["self_attn.attention_sink_bias"] = (config["num_attention_heads"],)
        if "conv_kernel_size" in told:
            length, group = told["conv_kernel_size"], told["conv_group_size"]
            for name in ("attention_conv", "mlp_conv"):
                layer[f"{name}.base_kernel"] = (2, length, hidden)
                layer[f"{name}.kernel_projection.weight"] = (2 * length * hidden // group, hidden)
        shapes |= {f"layers.{number}.{name}": shape for name, shape in layer.items()}
    if "selector_rank" in told:
        rank = told["selector_rank"]
        shapes["candidate_selector.predecessor_codebook"] = (config["vocab_size"], rank)
        shapes["candidate_selector.successor_codebook"] = (config["vocab_size"], rank)
        shapes["candidate_selector.hidden_projection.weight"] = (rank, hidden)
    return {name: _values(name, shape, rng) for name, shape in shapes.items()}


def _values(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(shape)
    if name.endswith("norm.weight"):
        noise = 1 + 0.3 * noise
    elif name.endswith("proj.weight") or name.endswith("projection.weight") or name == "fc.weight":
        noise *= 1.5 / np.sqrt(shape[-1])
    return noise.astype(np.float32)


def write(folder: Path, config: dict[str, Any], arrays: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    made = {name: mx.array(value) for name, value in arrays.items()}
    mx.save_safetensors(str(folder / "model.safetensors"), made, {"format": "pt"})
    return folder


def random_blocks(kind: str = "DFlash", *, seed: int = 3, **overrides: Any) -> BlockDraftModel:
    """In memory, without the loader."""
    config = published(kind, **overrides)
    return filled(BlockDraftModel(BlockConfig.from_dict(config, "config.json")), config, seed)


def filled(model: BlockDraftModel, config: dict[str, Any], seed: int = 3) -> BlockDraftModel:
    found = tensors(config, seed)
    named = [(f"{n}.weight" if n.endswith("codebook") else n, mx.array(v)) for n, v in found.items()]
    model.load_weights(named)
    mx.eval(model.parameters())
    model.eval()
    return model


class Told(BlockDraftModel):
    """A drafter that knows an answer: every `wrong`-th position of a text is guessed wrongly, all others rightly."""

    def tell(self, text: Sequence[int], wrong: int) -> None:
        self._text, self._wrong, self._at = list(text), wrong, 0

    def __call__(self, embeddings, windows):
        self._at = windows[0].stop + 1  # of the first guess: the token before it stands behind the context
        return super().__call__(embeddings, windows)

    def walk(self, token, hidden, logits, choose):
        for row in range(logits.shape[1]):
            at = self._at + row
            right = self._text[at] if at < len(self._text) else 0
            guess = (right + 1) % logits.shape[-1] if at % self._wrong == 0 else right
            if choose(20.0 * (mx.arange(logits.shape[-1]) == guess)[None].astype(mx.float32)) is None:
                return


def told(text: Sequence[int], wrong: int, kind: str = "DFlash", **overrides: Any) -> Told:
    """One that expects `text`, prompt and answer; the rest as in `published`."""
    config = published(kind, **overrides)
    made = filled(Told(BlockConfig.from_dict(config, "config.json")), config)
    made.tell(text, wrong)
    return made
