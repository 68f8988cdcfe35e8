"""What the metadata of a GGUF says, as config.json and generation_config.json say it.

Knows the keys of llama.cpp's architectures qwen35 and qwen35moe, and of the projector (mmproj) of their vision tower;
older files of Ollama's too. Knows tensors by name and shape only. What a key says is checked for its kind here, and
for its value by ModelConfig.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mlx_qwen35.checkpoint.gguf.container import Array, Gguf, GgufTensor
from mlx_qwen35.errors import CheckpointError

DENSE, MOE, PROJECTOR = "qwen35", "qwen35moe", "clip"
_OTHERS = {
    "qwen3next": "Qwen3-Next, another architecture than Qwen3.5",
    "qwen4exp": "Qwen3.8-Flash-Next, another architecture than Qwen3.5 to 3.8",
}
# Token ids that config.json names and a GGUF does not: by their text.
SPECIAL = {
    "image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>",
}  # fmt: skip
END_OF_TEXT, TURN_END = "<|endoftext|>", "<|im_end|>"
_SAMPLING = {
    "temp": "temperature", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p", "penalty_repeat": "repetition_penalty",
}  # fmt: skip
_YARN = {"attn_factor": "attention_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
_LARGEST = 1 << 40


class Keys:
    """The metadata of one file, by the names that follow a prefix."""

    def __init__(self, path: Path, values: Mapping[str, Any], prefix: str):
        self.path, self.values, self.prefix = path, values, prefix

    def fail(self, key: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: {self.prefix}{key} {problem}: download the file again")

    def get(self, key: str) -> Any:
        return self.values.get(self.prefix + key)

    def whole(self, key: str, default: int | None = None) -> int:
        """A count; of an array, as Ollama's older files have them by layer, the largest."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if value is None:
            raise self.fail(key, "is missing")
        if isinstance(value, Array):
            found = value.values()
            value = max(found, default=None) if all(type(item) is int for item in found) else None
        if type(value) is not int or not 0 <= value < _LARGEST:
            raise self.fail(key, f"is {value!r:.40} where a count is expected")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A float32 of the file as the decimal that was meant: 9.999999974752427e-07 is 1e-06."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) < 1e38:
            raise self.fail(key, "is missing" if value is None else f"is {value!r:.40} where a number is expected")
        return meant(value) if isinstance(value, float) else float(value)

    def wholes(self, key: str) -> list[int]:
        value = self.get(key)
        found = value.values() if isinstance(value, Array) and value.count <= 1 << 12 else None
        if found is None or any(type(item) is not int for item in found):
            raise self.fail(key, "is missing" if value is None else "is no list of counts")
        return found


def meant(value: float) -> float:
    """The shortest decimal that float32 reads as this."""
    return float(np.format_float_positional(np.float32(value), unique=True))


def architecture(gguf: Gguf) -> str:
    """qwen35, qwen35moe or clip; raises CheckpointError, in words, for whatever else a GGUF may hold."""
    found = gguf.metadata.get("general.architecture")
    if gguf.metadata.get("general.type") == "imatrix" or found == "imatrix":
        raise CheckpointError(f"{gguf.path} is an importance matrix, by which others quantize: give the model's file")
    rotated = sorted(key for key in gguf.metadata if key.startswith("prism."))
    if rotated:
        raise CheckpointError(
            f"{gguf.path} is one of prism-ml's models whose activations are rotated ({rotated[0]}), which is not read "
            "from GGUF: take their MLX form of it"
        )
    if gguf.metadata.get("general.type") == "adapter":
        raise CheckpointError(f"{gguf.path} is an adapter: give the model's file, and the adapter as PEFT has it")
    if found in (DENSE, MOE, PROJECTOR):
        return found
    if found is None and "split.no" in gguf.metadata:
        count = gguf.metadata.get("split.count")
        raise CheckpointError(f"{gguf.path} is not the first of its {count} files: give that")
    what = _OTHERS.get(found, "of another family") if isinstance(found, str) else "no architecture at all"
    raise CheckpointError(
        f"{gguf.path}: general.architecture is {found!r:.40} ({what}): this package runs Qwen3.5, 3.6 and 3.8 "
        f"({DENSE}, {MOE}); use llama.cpp for other models"
    )


def trunk_layers(gguf: Gguf) -> int:
    """Decoder layers without those of the MTP head, which stand at the end of block_count."""
    keys = Keys(gguf.path, gguf.metadata, f"{gguf.metadata['general.architecture']}.")
    count, heads = keys.whole("block_count"), keys.whole("nextn_predict_layers", 0)
    if not heads < count <= 4096:
        raise keys.fail("block_count", f"is {count}, with nextn_predict_layers {heads}")
    return count - heads


def config_of(gguf: Gguf, tokens: Mapping[str, int], projector: Gguf | None, mtp_layers: int) -> dict[str, Any]:
    """config.json as Hugging Face would have it. tokens: the ids of SPECIAL's and the ending tokens, by their text."""
    name = gguf.metadata["general.architecture"]
    moe = name == MOE
    kind = "qwen3_5_moe" if moe else "qwen3_5"
    text = _text(gguf, moe, mtp_layers)
    text["model_type"] = f"{kind}_text"
    text["eos_token_id"] = tokens.get(END_OF_TEXT)
    config: dict[str, Any] = {
        "architectures": [f"Qwen3_5{'Moe' if moe else ''}ForConditionalGeneration"],
        "model_type": kind,
        "tie_word_embeddings": text["tie_word_embeddings"],
        "text_config": {key: value for key, value in text.items() if value is not None},
    }
    config |= {key: tokens[text] for key, text in SPECIAL.items() if text in tokens}
    if projector is not None:
        config["vision_config"] = _vision(projector, kind)
    return config


def _text(gguf: Gguf, moe: bool, mtp_layers: int) -> dict[str, Any]:
    keys = Keys(gguf.path, gguf.metadata, f"{gguf.metadata['general.architecture']}.")
    layers, head = trunk_layers(gguf), keys.whole("attention.key_length")
    if keys.whole("attention.value_length", head) != head:
        raise keys.fail("attention.value_length", f"is not attention.key_length ({head})")
    heads = keys.whole("ssm.time_step_rank")
    if not heads or keys.whole("ssm.inner_size") % heads:
        raise keys.fail("ssm.time_step_rank", f"is {heads}, which does not divide ssm.inner_size")
    text: dict[str, Any] = {
        "hidden_size": keys.whole("embedding_length"),
        "num_hidden_layers": layers,
        "vocab_size": _embedding(gguf).shape[0],
        "layer_types": layer_types(gguf, layers),
        "num_attention_heads": keys.whole("attention.head_count"),
        "num_key_value_heads": keys.whole("attention.head_count_kv"),
        "head_dim": head,
        "linear_num_key_heads": keys.whole("ssm.group_count"),
        "linear_num_value_heads": heads,
        "linear_key_head_dim": keys.whole("ssm.state_size"),
        "linear_value_head_dim": keys.whole("ssm.inner_size") // heads,
        "linear_conv_kernel_dim": keys.whole("ssm.conv_kernel"),
        "rms_norm_eps": keys.number("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": keys.whole("context_length"),
        "rope_parameters": _rope(keys, head),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "mtp_num_hidden_layers": mtp_layers,
        "hidden_act": "silu",
        "attention_bias": False,
        "attn_output_gate": True,
        "full_attention_interval": keys.whole("full_attention_interval", 4),
    }
    if moe:
        text["num_experts"] = keys.whole("expert_count")
        text["num_experts_per_tok"] = keys.whole("expert_used_count")
        text["moe_intermediate_size"] = keys.whole("expert_feed_forward_length")
        text["shared_expert_intermediate_size"] = keys.whole("expert_shared_feed_forward_length")
    else:
        text["intermediate_size"] = keys.whole("feed_forward_length")
    return text


def layer_types(gguf: Gguf, layers: int) -> list[str]:
    """By the tensors, which are right where a file is older than the key that lists them."""
    delta = [any(f"blk.{n}.{name}" in gguf.tensors for name in ("ssm_a", "ssm_out.weight")) for n in range(layers)]
    return ["linear_attention" if there else "full_attention" for there in delta]


def _rope(keys: Keys, head: int) -> dict[str, Any]:
    sections = keys.wholes("rope.dimension_sections")
    rope = {
        "rope_type": "default",
        "rope_theta": keys.number("rope.freq_base"),
        "mrope_interleaved": True,  # always, and nothing in the file says so
        "mrope_section": sections[:3],
        "partial_rotary_factor": keys.whole("rope.dimension_count", head) / max(head, 1),
    }
    scaling = keys.get("rope.scaling.type")
    if scaling in (None, "none"):
        return rope
    if scaling != "yarn":
        raise keys.fail("rope.scaling.type", f"is {scaling!r:.40}, and only 'yarn' is read")
    rope["rope_type"] = "yarn"
    rope["factor"] = keys.number("rope.scaling.factor")
    rope["original_max_position_embeddings"] = keys.whole("rope.scaling.original_context_length")
    for theirs, ours in _YARN.items():
        if keys.get(f"rope.scaling.yarn_{theirs}") is not None:
            rope[ours] = keys.number(f"rope.scaling.yarn_{theirs}")
    return rope


def _embedding(gguf: Gguf) -> GgufTensor:
    found = gguf.tensors.get("token_embd.weight")
    if found is None or len(found.shape) != 2:
        raise CheckpointError(f"{gguf.path} has no token_embd.weight: download it again, or give the model's own file")
    return found


def check_projector(projector: Gguf) -> Keys:
    """Raises CheckpointError for a projector that is not of this family's vision tower."""
    keys = Keys(projector.path, projector.metadata, "clip.")
    kind = keys.get("projector_type") or keys.get("vision.projector_type")
    if kind != "qwen3vl_merger":
        raise keys.fail("projector_type", f"is {kind!r:.40}, and this family's is 'qwen3vl_merger'")
    deep = keys.get("vision.is_deepstack_layers")
    if isinstance(deep, Array) and any(deep.values()):
        raise keys.fail("vision.is_deepstack_layers", "names layers, which this family's tower has not")
    return keys


def prepared_by(projector: Gguf) -> dict[str, Any]:
    """What preprocessor_config.json says of patches and colours, as far as the projector says it."""
    keys = Keys(projector.path, projector.metadata, "clip.vision.")
    made: dict[str, Any] = {
        "patch_size": keys.whole("patch_size"),
        "temporal_patch_size": 2,
        "merge_size": keys.whole("spatial_merge_size", 2),
    }
    for key in ("image_mean", "image_std"):
        value = keys.get(key)
        made[key] = [meant(item) for item in value.values()] if isinstance(value, Array) else [0.5] * 3
    return made


def projected(projector: Gguf) -> int | None:
    """The width that a projector projects to, which is its model's; None where it does not say."""
    found = projector.metadata.get("clip.vision.projection_dim")
    return found if type(found) is int else None


def _vision(projector: Gguf, kind: str) -> dict[str, Any]:
    keys = check_projector(projector)
    keys = Keys(keys.path, keys.values, "clip.vision.")
    positions = projector.tensors.get("v.position_embd.weight")
    if positions is None:
        raise CheckpointError(f"{projector.path} has no v.position_embd.weight: download the file again")
    return {
        "model_type": kind,
        "depth": keys.whole("block_count"),
        "hidden_size": keys.whole("embedding_length"),
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_heads": keys.whole("attention.head_count"),
        "out_hidden_size": keys.whole("projection_dim"),
        "patch_size": keys.whole("patch_size"),
        "spatial_merge_size": keys.whole("spatial_merge_size", 2),
        "temporal_patch_size": 2,
        "in_channels": 3,
        "num_position_embeddings": positions.shape[0],
        "hidden_act": "gelu_pytorch_tanh",
        "deepstack_visual_indexes": [],
    }


def generation_of(gguf: Gguf, tokens: Mapping[str, int]) -> dict[str, Any]:
    """generation_config.json: sampling where the file has it, and all ids that end an answer."""
    keys = Keys(gguf.path, gguf.metadata, "tokenizer.ggml.")
    named = [keys.get("eos_token_id"), tokens.get(TURN_END), tokens.get(END_OF_TEXT)]
    made: dict[str, Any] = {"eos_token_id": list(dict.fromkeys(i for i in named if type(i) is int))}
    for theirs, ours in (("bos_token_id", "bos_token_id"), ("padding_token_id", "pad_token_id")):
        value = keys.get(theirs)
        made[ours] = value if type(value) is int else tokens.get(END_OF_TEXT)
    sampling = Keys(gguf.path, gguf.metadata, "general.sampling.")
    for theirs, ours in _SAMPLING.items():
        value = sampling.get(theirs)
        if value is not None:
            made |= {"do_sample": True, ours: int(value) if ours == "top_k" else sampling.number(theirs)}
    return {key: value for key, value in made.items() if value is not None}
