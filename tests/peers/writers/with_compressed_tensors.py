"""Quantizes a checkpoint with compressed-tensors itself: run by the Python of an environment that has it.

    python with_compressed_tensors.py SOURCE SCHEME DTYPE OUT PLAIN

SOURCE: a text checkpoint as Hugging Face has it. SCHEME: JSON of QuantizationArgs, and a format. OUT: what the
library saves. PLAIN: the same as it decodes that, unquantized.
"""

import json
import sys

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from transformers import AutoModelForCausalLM

IGNORED = ["lm_head", "re:.*in_proj_[ab]$", "re:.*mlp.gate$", "re:.*shared_expert_gate$"]


def extremes(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """The least and the largest of each scale's values."""
    out, inner = weight.shape
    if args.strategy == "tensor":
        return weight.min().reshape(1), weight.max().reshape(1)
    if args.strategy == "channel":
        return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    if args.strategy == "block":
        high, wide = args.block_structure
        padded = torch.nn.functional.pad(weight, (0, -inner % wide, 0, -out % high))
        blocks = padded.reshape(padded.shape[0] // high, high, padded.shape[1] // wide, wide)
        return blocks.amin((1, 3)), blocks.amax((1, 3))
    groups = weight.reshape(out, -1, args.group_size)
    return groups.amin(-1), groups.amax(-1)


def main(source: str, scheme: str, dtype: str, out: str, plain: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=getattr(torch, dtype))
    told = json.loads(scheme)
    args = QuantizationArgs(**told["weights"])
    group = QuantizationScheme(targets=["Linear"], weights=args, format=told["format"])
    config = QuantizationConfig(config_groups={"group_0": group}, ignore=IGNORED, format=told["format"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if getattr(module, "quantization_scheme", None) is None:
            continue
        weight = module.weight.data
        low, high = extremes(weight, args)
        whole = None
        if hasattr(module, "weight_global_scale"):
            whole = generate_gparam(weight.min(), weight.max())
            module.weight_global_scale.data.copy_(whole.reshape(module.weight_global_scale.shape))
        scale, zero = calculate_qparams(low, high, args, global_scale=whole)
        module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
        if hasattr(module, "weight_zero_point"):
            module.weight_zero_point.data.copy_(zero.reshape(module.weight_zero_point.shape))
    compressor = ModelCompressor(quantization_config=config)
    compressor.compress_model(model)
    model.save_pretrained(out)
    compressor.update_config(out)
    compressor.decompress_model(model)
    kept = {name: value.float() for name, value in model.state_dict().items() if "weight_" not in name}
    model.float().save_pretrained(plain, state_dict={n: v for n, v in kept.items() if not n.endswith("_scale")})


main(*sys.argv[1:])
