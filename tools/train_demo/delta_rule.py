"""The reference's chunked gated delta rule, arranged for a quick backward pass on a CPU: the same sums, shorter chunks.

The reference indexes its chunk axis inside the scan, and each index costs a full-size zero tensor on the way back. Here
the chunks are taken apart once. Only training uses this; every accuracy is measured with the reference's own function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def unit(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def chunked_gated_delta_rule(query, key, value, g, beta, chunk_size: int = 32, **_) -> tuple[torch.Tensor, None]:
    """query, key: [B, T, Hk, Dk]; value: [B, T, Hv, Dv]; g (log decay), beta: [B, T, Hv] -> ([B, T, Hv, Dv], None)

    T must be a multiple of the chunk; float32, zero initial state.
    """
    B, T, heads, dk = key.shape
    repeat, chunks = value.shape[2] // heads, T // chunk_size
    query, key = unit(query) * dk**-0.5, unit(key)
    if repeat > 1:
        query, key = query.repeat_interleave(repeat, 2), key.repeat_interleave(repeat, 2)
    cut = lambda x: x.transpose(1, 2).reshape(B, x.shape[2], chunks, chunk_size, *x.shape[3:])  # noqa: E731
    query, key, value, g, beta = (cut(x) for x in (query, key, value, g, beta))  # [B, H, N, C, ...]
    total = g.cumsum(-1)
    later = torch.ones(chunk_size, chunk_size, dtype=torch.bool).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(later, float("-inf")).exp()
    grown = total.exp()[..., None]
    key_beta = key * beta[..., None]
    system = (key_beta @ key.mT) * decay
    # One solve for both right-hand sides: the new values and the keys that read the old state.
    right = torch.cat([value * beta[..., None], key_beta * grown], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    written, read = solved.split([value.shape[-1], dk], -1)
    within = (query @ key.mT) * decay
    query = query * grown
    key = key * (total[..., -1:] - total).exp()[..., None]
    carried = total[..., -1].exp()[..., None, None]
    state, out = None, []
    for q, k, w, r, a, c in zip(*(x.unbind(2) for x in (query, key, written, read, within, carried)), strict=True):
        if state is None:
            out.append(a @ w)
            state = k.mT @ w
        else:
            w = w - r @ state
            out.append(q @ state + a @ w)
            state = state * c + k.mT @ w
    return torch.stack(out, 2).reshape(B, -1, T, w.shape[-1]).transpose(1, 2), None


def check() -> float:
    """The largest difference from the reference on random inputs."""
    from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import torch_chunk_gated_delta_rule as reference

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 96, 2, 16), torch.randn(3, 96, 2, 16), torch.randn(3, 96, 4, 24)
    g, beta = -F.softplus(torch.randn(3, 96, 4)), torch.rand(3, 96, 4)
    ours = chunked_gated_delta_rule(q, k, v, g, beta)[0]
    theirs = reference(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)[0]
    return (ours - theirs).abs().max().item()
