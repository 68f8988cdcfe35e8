"""Writes an adapter with PEFT itself, and what the model says with it: run by the Python of an environment that has it.

    python with_peft.py SOURCE CONFIG TOKENS ADAPTER LOGITS

CONFIG: JSON of LoraConfig. TOKENS: JSON. ADAPTER: what PEFT saves. LOGITS: float32 [tokens, vocabulary], by NumPy.
"""

import json
import sys

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main(source: str, config: str, tokens: str, adapter: str, logits: str) -> None:
    torch.manual_seed(3)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32), LoraConfig(**json.loads(config))
    ).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "modules_to_save" in name:
                value += 0.1 * torch.randn_like(value)
            elif "magnitude" in name:
                value *= 1 + 0.2 * torch.rand_like(value)
            elif "lora_" in name:
                value.copy_(0.2 * torch.randn_like(value))
        said = model(torch.tensor([json.loads(tokens)])).logits[0]
    model.save_pretrained(adapter)
    np.save(logits, said.numpy())


main(*sys.argv[1:])
