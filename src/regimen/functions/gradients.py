"""Gradients of several losses as vectors, and what becomes of them where they disagree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def flat_gradient(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """Of a loss `[]`, `[P]`; 0 where it does not depend on a parameter. Leaves `.grad` as it is."""
    if not loss.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    found = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in found])


def pcgrad(gradients: Tensor, rng: torch.Generator) -> Tensor:
    """The sum of gradients, each without what would undo another (PCGrad, Yu et al. 2020, algorithm 1).

    `g_i -= (g_i . g_j / |g_j|^2) g_j` for the others in random order, wherever the two point against each other; `g_j`
    is the original one.

    Args:
        gradients: `[K, P]`, of each task.
        rng: random stream for the order.

    Returns:
        `[P]`. Gradients without a conflict are summed as they are.

    Raises:
        ValueError: `gradients` does not have two dimensions.
    """
    if gradients.ndim != 2:
        raise ValueError(f"pcgrad: gradients has shape {list(gradients.shape)}, expected [K, P], one row for each task")
    squares = gradients.square().sum(1)
    projected = gradients.clone()
    for row, mine in enumerate(projected):
        for other in torch.randperm(len(gradients), generator=rng, device=rng.device).tolist():
            along = mine @ gradients[other]
            if other != row and along < 0:
                mine -= along / squares[other] * gradients[other]
    return projected.sum(0)


def conflict(gradients: Tensor) -> Tensor:
    """The share of pairs of gradients `[K, P]` that point against each other, `[]`; 0 of a single one."""
    products = gradients @ gradients.t()
    pairs = torch.ones_like(products).triu(1).bool()
    return (products[pairs] < 0).to(gradients).mean() if len(gradients) > 1 else gradients.new_zeros(())
