"""Make the golden vectors: what transformers computes for random models of many shapes, in float32.

    OMP_NUM_THREADS=1 python tests/golden/make_golden.py        (needs torch and transformers; run by hand)

Writes, beside itself, cases.json (configuration, seed, a checksum of the weights, versions) and CASE.npz (ids [T]
int32, logits [T, vocab] float32). Weights are not stored: tests/checkpoints.py gives the same ones everywhere.
Knows transformers' text models. Knows nothing of this package.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Qwen3_5ForCausalLM, Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig, Qwen3_5TextConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from tests.checkpoints import random_tensors, tiny_config  # noqa: E402

L, F = "linear_attention", "full_attention"
PUBLISHED_HEADS = {
    "head_dim": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "layer_types": [L, L, L, F],
    "rope_parameters": {"partial_rotary_factor": 0.25, "mrope_section": [11, 11, 10]},
}


def yarn(factor: float, **others: Any) -> dict[str, Any]:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": 64} | others


def named_cases() -> dict[str, tuple[dict[str, Any], int]]:
    """name -> (config, number of tokens): each sets one thing apart from the tiny default."""
    wide_rope = {"partial_rotary_factor": 1.0, "mrope_section": [3, 3, 2]}
    return {
        "dense": (tiny_config("dense"), 150),
        "moe": (tiny_config("moe"), 150),
        "dense-fllf-untied-kernel3": (
            tiny_config("dense", flat=True, layer_types=[F, L, L, F], tie_word_embeddings=False,
                        linear_conv_kernel_dim=3, num_attention_heads=5, num_key_value_heads=1,
                        linear_num_key_heads=3, linear_num_value_heads=3, linear_key_head_dim=20), 130),
        "dense-linear-only": (tiny_config("dense", layer_types=[L, L, L], linear_num_key_heads=1), 130),
        "dense-full-only": (tiny_config("dense", layer_types=[F, F], num_attention_heads=7, num_key_value_heads=7), 70),
        "moe-lffl-tied": (
            tiny_config("moe", flat=True, layer_types=[L, F, F, L], tie_word_embeddings=True, num_experts=5,
                        num_experts_per_tok=4, linear_num_key_heads=5, linear_num_value_heads=5), 100),
        "moe-top1": (tiny_config("moe", num_experts=3, num_experts_per_tok=1, layer_types=[L, F]), 70),
        "dense-yarn2": (
            tiny_config("dense", max_position_embeddings=64, layer_types=[L, F, F],
                        rope_parameters=wide_rope | yarn(2.0)), 120),
        "moe-yarn4": (
            tiny_config("moe", max_position_embeddings=256, layer_types=[F, L, F],
                        rope_parameters=wide_rope | yarn(4.0)), 150),
        "dense-yarn-tuned": (
            tiny_config("dense", max_position_embeddings=512, layer_types=[F, L, F], rope_parameters=wide_rope | yarn(
                8.0, beta_fast=16.0, beta_slow=2.0, attention_factor=1.25, rope_theta=10000)), 70),
        "dense-published-heads": (tiny_config("dense", **PUBLISHED_HEADS), 140),
        "moe-published-heads": (tiny_config("moe", **PUBLISHED_HEADS), 70),
    }  # fmt: skip


def drawn_config(rng: np.random.RandomState) -> dict[str, Any]:
    """A configuration drawn at random, every size on its own."""

    def pick(*choices: Any) -> Any:
        return choices[rng.randint(len(choices))]

    key_heads, kv_heads = pick(1, 2, 3), pick(1, 2, 3)
    rotary = pick(8, 12)
    sections = [rotary // 2 - 2 * (rotary // 6), rotary // 6, rotary // 6]
    overrides = {
        "hidden_size": pick(32, 48, 56, 80),
        "vocab_size": pick(90, 97, 131),
        "layer_types": [pick(L, F) for _ in range(pick(2, 3, 5))],
        "head_dim": pick(12, 16, 24),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * pick(1, 2, 3),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * pick(1, 2, 4),
        "linear_key_head_dim": pick(8, 12, 24, 32),
        "linear_value_head_dim": pick(6, 16, 20, 32),
        "linear_conv_kernel_dim": pick(2, 3, 4, 5),
        "rms_norm_eps": pick(1e-6, 1e-5),
        "tie_word_embeddings": bool(pick(0, 1)),
    }
    overrides["rope_parameters"] = {
        "rope_theta": pick(10000, 1000000, 10000000),
        "partial_rotary_factor": rotary / overrides["head_dim"],
        "mrope_section": sections,
    }
    kind = pick("dense", "moe")
    if kind == "dense":
        overrides["intermediate_size"] = pick(40, 72, 128)
    else:
        experts = pick(4, 7, 16)
        overrides |= {
            "num_experts": experts,
            "num_experts_per_tok": pick(1, 2, experts),
            "moe_intermediate_size": pick(16, 20, 48),
            "shared_expert_intermediate_size": pick(16, 28, 64),
        }
    return tiny_config(kind, flat=bool(pick(0, 1)), **overrides)


def reference_logits(config: dict[str, Any], tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """[T, vocab] float32 from transformers."""
    text = dict(config.get("text_config", config))
    moe = "num_experts" in text
    config_class, model_class = (
        (Qwen3_5MoeTextConfig, Qwen3_5MoeForCausalLM) if moe else (Qwen3_5TextConfig, Qwen3_5ForCausalLM)
    )
    model = model_class(config_class(**text, attn_implementation="eager")).float().eval()
    state = {name.replace("model.language_model.", "model."): torch.from_numpy(v) for name, v in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"names differ from transformers': missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    with torch.no_grad():
        return model(torch.from_numpy(ids[None]).long(), use_cache=False).logits[0].float().numpy()


def checksum(tensors: dict[str, np.ndarray]) -> float:
    return float(sum(np.abs(v, dtype=np.float64).sum() for v in tensors.values()))


def main() -> None:
    cases = named_cases()
    for number in range(8):
        cases[f"drawn-{number}"] = (drawn_config(np.random.RandomState(100 + number)), 70 + 3 * number)
    record = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": {}}
    for seed, (name, (config, length)) in enumerate(cases.items()):
        tensors = random_tensors(config, seed)
        vocab = config.get("text_config", config)["vocab_size"]
        ids = np.random.RandomState(1000 + seed).randint(0, vocab, length).astype(np.int32)
        logits = reference_logits(config, tensors, ids)
        np.savez_compressed(HERE / f"{name}.npz", ids=ids, logits=logits)
        record["cases"][name] = {"seed": seed, "checksum": checksum(tensors), "config": config}
        print(f"{name:28s} T {length:4d}  vocab {vocab:3d}  std {logits.std():.3f}")
    (HERE / "cases.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
