"""Muon: momentum whose matrix updates are orthogonalized by a Newton-Schulz iteration (Jordan et al., 2024).

Stacked experts count as a batch of matrices. Everything that is not a matrix belongs to AdamW.
"""

from __future__ import annotations

import torch


def orthogonalize(g: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """g: [..., m, n] -> the nearest semi-orthogonal matrix, roughly: singular values end between 0.7 and 1.2."""
    a, b, c = 3.4445, -4.7750, 2.0315  # quintic coefficients of the paper: steep at zero
    tall = g.shape[-2] > g.shape[-1]
    x = g.mT if tall else g
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """`rank` of `workers` updates its share of the matrices and hands the result to the others, who have the same
    gradients and would compute the same."""

    def __init__(
        self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0, rank: int = 0, workers: int = 1
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.rank, self.workers = rank, workers

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            moving = [p for p in group["params"] if p.grad is not None]
            updates = [torch.zeros_like(p) for p in moving]
            # Largest first, so that every worker gets about the same work.
            order = sorted(range(len(moving)), key=lambda i: -moving[i].numel())
            for place, i in enumerate(order):
                p = moving[i]
                momentum = self.state[p].setdefault("momentum", torch.zeros_like(p))
                momentum.lerp_(p.grad, 1 - group["momentum"])
                if place % self.workers == self.rank:
                    updates[i] = orthogonalize(p.grad.lerp(momentum, group["momentum"]))
            if self.workers > 1:
                flat = torch.cat([u.flatten() for u in updates])
                torch.distributed.all_reduce(flat)
                updates = [u.view_as(p) for u, p in zip(flat.split([p.numel() for p in moving]), moving, strict=True)]
            for p, update in zip(moving, updates, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(update, alpha=-group["lr"] * max(1.0, p.shape[-2] / p.shape[-1]) ** 0.5)
