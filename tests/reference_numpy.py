"""A plain NumPy text model in float64: one token after the other, one head after the other, no caches.

Knows the published names and the arithmetic of the architecture. Knows nothing of MLX or of this package, so that an
error in one is not an error in both. Sequences are single rows [T, ...].
"""

from collections.abc import Mapping
from typing import Any

import numpy as np


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(0.5 * x))


def silu(x: np.ndarray) -> np.ndarray:
    return x * sigmoid(x)


def delta_rule(q, k, v, decay, beta, state):
    """q, k [T, Hk, Dk], v [T, Hv, Dv], decay, beta [T, Hv], state [Hv, Dv, Dk] -> outputs [T, Hv, Dv], state."""
    state, out = np.array(state, np.float64), np.zeros(v.shape)
    share = v.shape[1] // k.shape[1]
    for t in range(len(v)):
        for h in range(v.shape[1]):
            key, query = k[t, h // share], q[t, h // share]
            kept = decay[t, h] * state[h]
            state[h] = kept + beta[t, h] * np.outer(v[t, h] - kept @ key, key)
            out[t, h] = state[h] @ query
    return out, state


class Reference:
    """The layers and the whole of one flat configuration (tests.checkpoints.tiny_config) and its HF tensors."""

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]):
        self.config = config
        self.tensors = {name.removeprefix("model."): np.asarray(t, np.float64) for name, t in tensors.items()}

    def logits(self, tokens, positions=None) -> np.ndarray:
        """tokens [T] -> logits [T, vocab]; positions [T] or [3, T], counted from 0 where none are given."""
        return self.head(self.hidden(tokens, positions))

    def hidden(self, tokens, positions=None) -> np.ndarray:
        """The same before the head, [T, H]."""
        positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
        return self.rms(self.through(self.embedded(tokens), self.config["layer_types"], positions), "norm")

    def embedded(self, tokens):
        return self.tensors["embed_tokens.weight"][np.asarray(tokens)]

    def head(self, hidden):
        return hidden @ self.tensors.get("lm_head.weight", self.tensors["embed_tokens.weight"]).T

    def through(self, x, kinds, positions):
        for n, kind in enumerate(kinds):
            h = self.rms(x, f"layers.{n}.input_layernorm")
            x = x + (self.attention(h, n, positions) if kind == "full_attention" else self.delta_net(h, n))
            x = x + self.feed_forward(self.rms(x, f"layers.{n}.post_attention_layernorm"), n)
        return x

    def guesses(self, tokens, hidden, positions=None) -> np.ndarray:
        """The MTP head: hidden [T, H] at positions, tokens [T] that come one later -> its own hidden states [T, H]."""
        mine = Reference(self.config, {n.removeprefix("mtp."): t for n, t in self.tensors.items() if n[:4] == "mtp."})
        joined = [mine.rms(self.embedded(tokens), "pre_fc_norm_embedding"), mine.rms(hidden, "pre_fc_norm_hidden")]
        positions = np.arange(len(tokens)) if positions is None else np.asarray(positions)
        x = mine.linear(np.concatenate(joined, axis=-1), "fc")
        return mine.rms(mine.through(x, ["full_attention"], positions), "norm")

    def rms(self, x, name, *, plain=False):
        scale = self.tensors[name + ".weight"] + (0 if plain else 1)
        return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + self.config["rms_norm_eps"]) * scale

    def linear(self, x, name):
        return x @ self.tensors[name + ".weight"].T

    def attention(self, x, n, positions):
        c, name, length = self.config, f"layers.{n}.self_attn.", len(x)
        heads, shared, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        both = self.linear(x, name + "q_proj").reshape(length, heads, 2, dim)
        queries = self.turn(self.rms(both[:, :, 0], name + "q_norm"), positions)
        keys = self.linear(x, name + "k_proj").reshape(length, shared, dim)
        keys = self.turn(self.rms(keys, name + "k_norm"), positions)
        values = self.linear(x, name + "v_proj").reshape(length, shared, dim)
        out = np.zeros((length, heads, dim))
        for t in range(length):
            for h in range(heads):
                kv = h // (heads // shared)
                scores = keys[: t + 1, kv] @ queries[t, h] / np.sqrt(dim)
                chances = np.exp(scores - scores.max())
                out[t, h] = chances / chances.sum() @ values[: t + 1, kv] * sigmoid(both[t, h, 1])
        return self.linear(out.reshape(length, -1), name + "o_proj")

    def turn(self, x, positions):
        """x [T, H, D]: pair (j, j + half) turns by position * frequency_j."""
        frequencies, factor = self.frequencies()
        half = len(frequencies)
        axes = np.broadcast_to(positions, (3, len(x)))
        section = self.config["rope_parameters"]["mrope_section"]
        out = x.copy()
        for j in range(half):
            axis = j % 3 if j % 3 and j < 3 * section[j % 3] else 0
            cos, sin = (factor * f(axes[axis] * frequencies[j])[:, None] for f in (np.cos, np.sin))
            out[..., j] = x[..., j] * cos - x[..., j + half] * sin
            out[..., j + half] = x[..., j + half] * cos + x[..., j] * sin
        return out

    def frequencies(self):
        rope = self.config["rope_parameters"]
        dim = int(self.config["head_dim"] * rope["partial_rotary_factor"])
        plain = np.array([rope["rope_theta"] ** (-2 * j / dim) for j in range(dim // 2)])
        if rope["rope_type"] == "default":
            return plain, 1.0
        span, factor = rope["original_max_position_embeddings"], rope["factor"]
        turns = span / (2 * np.pi)
        low, high = (dim * np.log(turns / n) / np.log(rope["rope_theta"]) / 2 for n in (32, 1))
        low, high = max(np.floor(low), 0), min(np.ceil(high), dim - 1)
        mixed = []
        for j, f in enumerate(plain):
            slow = min(max((j - low) / max(high - low, 1e-3), 0), 1)
            mixed.append(f * (1 - slow) + f / factor * slow)
        return np.array(mixed), 0.1 * np.log(factor) + 1

    def delta_net(self, x, n):
        c, name, length = self.config, f"layers.{n}.linear_attn.", len(x)
        key_heads, key_dim = c["linear_num_key_heads"], c["linear_key_head_dim"]
        heads, dim = c["linear_num_value_heads"], c["linear_value_head_dim"]
        u, taps = self.linear(x, name + "in_proj_qkv"), self.tensors[name + "conv1d.weight"][:, 0]
        mixed = np.zeros_like(u)
        for t in range(length):
            for back in range(min(taps.shape[1], t + 1)):
                mixed[t] += u[t - back] * taps[:, -1 - back]
        mixed = silu(mixed)
        keys = key_heads * key_dim
        q, k, v = mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :]
        q, k = (a.reshape(length, key_heads, key_dim) for a in (q, k))
        q, k = (a / np.sqrt(np.sum(a**2, axis=-1, keepdims=True) + 1e-6) for a in (q, k))
        slow = np.logaddexp(0, self.linear(x, name + "in_proj_a") + self.tensors[name + "dt_bias"])
        decay = np.exp(-np.exp(self.tensors[name + "A_log"]) * slow)
        beta = sigmoid(self.linear(x, name + "in_proj_b"))
        out, _ = delta_rule(
            q / np.sqrt(key_dim), k, v.reshape(length, heads, dim), decay, beta, np.zeros((heads, dim, key_dim))
        )
        gate = silu(self.linear(x, name + "in_proj_z").reshape(length, heads, dim))
        return self.linear((self.rms(out, name + "norm", plain=True) * gate).reshape(length, -1), name + "out_proj")

    def feed_forward(self, x, n):
        name = f"layers.{n}.mlp."
        if "num_experts" not in self.config:
            return self.gated(x, *(self.tensors[f"{name}{p}_proj.weight"] for p in ("gate", "up", "down")))
        shared = self.gated(x, *(self.tensors[f"{name}shared_expert.{p}_proj.weight"] for p in ("gate", "up", "down")))
        out = sigmoid(self.linear(x, name + "shared_expert_gate")) * shared
        chances = np.exp(self.linear(x, name + "gate"))
        for t, row in enumerate(chances):
            chosen = np.argsort(row)[-self.config["num_experts_per_tok"] :]
            for e in chosen:
                gate, up = np.split(self.tensors[name + "experts.gate_up_proj"][e], 2)
                down = self.tensors[name + "experts.down_proj"][e]
                out[t] += row[e] / row[chosen].sum() * self.gated(x[t], gate, up, down)
        return out

    @staticmethod
    def gated(x, gate, up, down):
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T
