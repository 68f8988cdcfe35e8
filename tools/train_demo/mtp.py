"""Qwen3.5's multi-token-prediction head in torch, which transformers leaves out. The tensors have the published names.

From the final-normed hidden state at position i and the embedding of token i+1 it predicts token i+2: both are normed
and joined by `fc` (embedding first), one full-attention decoder layer follows with rope position i, then a norm; the
embedding and the head are the main model's.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeDecoderLayer, Qwen3_5MoeRMSNorm


class MultiTokenPredictor(nn.Module):
    def __init__(self, text_config) -> None:
        super().__init__()
        hidden, eps = text_config.hidden_size, text_config.rms_norm_eps
        self.fc = nn.Linear(2 * hidden, hidden, bias=False)
        self.pre_fc_norm_embedding = Qwen3_5MoeRMSNorm(hidden, eps)
        self.pre_fc_norm_hidden = Qwen3_5MoeRMSNorm(hidden, eps)
        self.norm = Qwen3_5MoeRMSNorm(hidden, eps)
        attention_layer = text_config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([Qwen3_5MoeDecoderLayer(text_config, attention_layer)])

    def forward(self, next_embedding: torch.Tensor, hidden: torch.Tensor, position_embeddings) -> torch.Tensor:
        """next_embedding, hidden: [B, T, H]; position_embeddings: (cos, sin) at the hidden states -> [B, T, H]"""
        joined = torch.cat([self.pre_fc_norm_embedding(next_embedding), self.pre_fc_norm_hidden(hidden)], dim=-1)
        x = self.fc(joined)
        x = self.layers[0](x, position_embeddings=position_embeddings, attention_mask=None)
        return self.norm(x)
