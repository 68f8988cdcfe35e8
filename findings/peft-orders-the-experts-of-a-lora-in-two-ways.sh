#!/usr/bin/env bash
# Version: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# One would guess: A LoRA on the experts of a mixture (target_parameters) has names that say which parameter it is for, and its two
#   factors count experts and ranks alike: in blocks of one expert each.
# What happens: The shared axis of length experts x rank goes by experts in lora_A and by ranks in lora_B. No name has gate_up_proj
#   or down_proj in it: the one that was wrapped first is under "base_layer", the other is not. Read any other way, the shapes
#   fit all the same.
# Seen (Qwen3.5 MoE, 5 experts, rank 3, hidden 32, intermediate 24):
#     experts.base_layer.lora_A.weight (15, 32)
#     experts.base_layer.lora_B.weight (48, 15)
#     experts.lora_A.weight (15, 24)
#     experts.lora_B.weight (32, 15)
#     gate_up_proj is base_layer's B x A with A by experts, B by ranks
#     down_proj is the other B x A with A by experts, B by ranks
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

EXPERTS, RANK, SCALE = 5, 3, 2
sizes = dict(hidden_size=32, moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=EXPERTS, vocab_size=64,
             num_experts_per_tok=2, num_hidden_layers=1, layer_types=["full_attention"], num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)
model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**sizes))
before = {name: value.clone() for name, value in model.model.layers[0].mlp.experts.named_parameters()}
targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
how = LoraConfig(r=RANK, lora_alpha=RANK * SCALE, target_modules=[], target_parameters=targets, init_lora_weights=False)
lora = get_peft_model(model, how)
state = {name.split("mlp.")[1]: value.clone() for name, value in get_peft_model_state_dict(lora).items()}
for name, value in state.items():
    print(name, tuple(value.shape))
after = dict(lora.merge_and_unload().model.layers[0].mlp.experts.named_parameters())

def factors(under):
    a, b = state[f"experts.{under}lora_A.weight"], state[f"experts.{under}lora_B.weight"]
    yield "A by experts", a.reshape(EXPERTS, RANK, -1), "B by ranks", b.reshape(-1, RANK, EXPERTS).permute(2, 0, 1)
    yield "A by experts", a.reshape(EXPERTS, RANK, -1), "B by experts", b.reshape(-1, EXPERTS, RANK).permute(1, 0, 2)
    yield "A by ranks", a.reshape(RANK, EXPERTS, -1).transpose(0, 1), "B by ranks", b.reshape(-1, RANK, EXPERTS).permute(2, 0, 1)
    yield "A by ranks", a.reshape(RANK, EXPERTS, -1).transpose(0, 1), "B by experts", b.reshape(-1, EXPERTS, RANK).permute(1, 0, 2)

for parameter, under, said in (("gate_up_proj", "base_layer.", "base_layer's"), ("down_proj", "", "the other")):
    update = after[parameter] - before[parameter]
    right = [f"{how_a}, {how_b}" for how_a, a, how_b, b in factors(under) if torch.allclose(SCALE * (b @ a), update, atol=1e-5)]
    print(f"{parameter} is {said} B x A with {right[0]}")
    assert right == ["A by experts, B by ranks"]
PYTHON
