#!/usr/bin/env bash
# Version: peft 0.21.2, transformers 5.24.0, torch 2.13.0
# One would guess: target_modules="all-linear" puts a LoRA on all linear layers of a mixture of experts but the head, and
#   ["gate_proj", "up_proj", "down_proj"] on those of the MLPs. modules_to_save=["norm"] saves the module of that name.
# What happens: transformers keeps the experts and the router as bare parameters: neither is found, and only the shared expert is
#   trained, without a word. modules_to_save goes by how a name ends, not by its last part: "norm" takes every norm there
#   is (input_layernorm, q_norm, ...), where target_modules wants the whole part.
# Seen (Qwen3.5 MoE, one layer, 64 experts):
#     all-linear, in the MLP: shared_expert, shared_expert_gate
#     gate_proj, up_proj, down_proj: shared_expert
#     weights of the MLP that a LoRA is on: 2 %
#     modules_to_save norm: input_layernorm, k_norm, norm, post_attention_layernorm, q_norm
# Ends with 0 as long as that is so.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 transformers==5.24.0 peft==0.21.2
cd "$folder"
env/bin/python - <<'PYTHON'
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

sizes = dict(hidden_size=32, moe_intermediate_size=24, shared_expert_intermediate_size=24, num_experts=64, vocab_size=64,
             num_experts_per_tok=2, num_hidden_layers=1, layer_types=["full_attention"], num_attention_heads=2,
             num_key_value_heads=1, head_dim=16)

def trained(**how):
    model = Qwen3_5MoeForCausalLM(Qwen3_5MoeTextConfig(**sizes))
    weights = {name.removesuffix(".weight"): value.numel() for name, value in model.named_parameters()}
    state = get_peft_model_state_dict(get_peft_model(model, LoraConfig(r=4, **how)))
    return weights, {name.removeprefix("base_model.model.").split(".lora_")[0].removesuffix(".weight") for name in state}

seen = []
parts = ["gate_proj", "up_proj", "down_proj"]
for said, targets in (("all-linear, in the MLP", "all-linear"), (", ".join(parts), parts)):
    weights, names = trained(target_modules=targets)
    seen.append(sorted({name.split(".mlp.")[1].split(".")[0] for name in names if ".mlp." in name}))
    print(f"{said}: {', '.join(seen[-1])}")
share = sum(weights[name] for name in names) / sum(size for name, size in weights.items() if ".mlp." in name)
print(f"weights of the MLP that a LoRA is on: {100 * share:.0f} %")
_, names = trained(target_modules=["o_proj"], modules_to_save=["norm"])
norms = sorted({name.split(".")[-1] for name in names if not name.endswith("o_proj")})
print(f"modules_to_save norm: {', '.join(norms)}")
assert seen == [["shared_expert", "shared_expert_gate"], ["shared_expert"]] and share < 0.03
assert norms == ["input_layernorm", "k_norm", "norm", "post_attention_layernorm", "q_norm"]
PYTHON
