"""What a configuration calls for is what Model has, name by name and shape by shape."""

import math

import pytest
from mlx.utils import tree_flatten

from mlx_qwen35.checkpoint.inventory import PATCH_EMBEDDING, is_linear, text_tensors, vision_tensors
from mlx_qwen35.config import ModelConfig
from mlx_qwen35.model import Model
from tests.checkpoints import tiny_config

CONFIGS = {
    "dense": tiny_config("dense"),
    "moe": tiny_config("moe"),
    "untied": tiny_config("dense", tie_word_embeddings=False),
    "seeing": tiny_config("dense", vision=True),
    "other layers": tiny_config("moe", layer_types=["full_attention", "linear_attention", "full_attention"]),
    "wide heads": tiny_config("dense", linear_key_head_dim=20, linear_num_value_heads=4, linear_conv_kernel_dim=3),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_inventory_is_the_models(case: str) -> None:
    config = ModelConfig.from_dict(CONFIGS[case])
    model = Model(config)
    parameters = {name: value.shape for name, value in tree_flatten(model.parameters())}
    shapes = text_tensors(config) | vision_tensors(config)
    if PATCH_EMBEDDING in shapes:
        rows, *kernel = shapes.pop(PATCH_EMBEDDING)
        assert parameters.pop(PATCH_EMBEDDING) == (rows, math.prod(kernel))
    assert shapes == parameters
    quantizable = {f"{path}.weight" for path, module in model.named_modules() if hasattr(module, "to_quantized")}
    quantizable.discard(PATCH_EMBEDDING)  # a convolution in files
    assert {name for name, shape in parameters.items() if is_linear(name, shape)} == quantizable
