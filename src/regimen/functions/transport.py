"""Optimal transport between two sequences: what it costs to move one onto the other, and the plan that costs least."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Potentials that move by less than this part of the largest one are at rest, as far as single precision tells.
_STILL = 1e-6
# Iterations from one that is computed with logarithms to the next.
_ABSORBED = 10


def cosine_cost(x: Tensor, y: Tensor) -> Tensor:
    """`1 - cos(x_i, y_j)`, `[..., H, W]` for features `x [..., H, D]` and `y [..., W, D]`; 1 for a vector of zeros."""
    _check_features("cosine_cost", x, y)
    return 1 - torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(y, dim=-1).mT


def euclidean_cost(x: Tensor, y: Tensor) -> Tensor:
    """`||x_i - y_j||`, `[..., H, W]` for features `x [..., H, D]` and `y [..., W, D]`."""
    _check_features("euclidean_cost", x, y)
    # By differences and not by a product of matrices, whose rounding would decide which of equal distances is least.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def sinkhorn(cost: Tensor, epsilon: float = 0.01, iterations: int = 100) -> Tensor:
    """The plan of least cost with uniform marginals and an entropy, `[..., H, W]` (Cuturi 2013, alg. 1).

    It minimises `sum P C + epsilon sum P log P` over plans whose rows add up to `1 / H` and columns to `1 / W`. After
    every iteration the rows do so exactly, the columns only once it has converged, where it ends early. `exp(-C /
    epsilon)` itself is 0 in single precision for a cost of 1.04 and the default epsilon. So every tenth iteration is
    computed with logarithms, and those between are products with the plan so far (Schmitzer 2019, section 3.1).

    Args:
        cost: `[..., H, W]`.
        epsilon: weight of the entropy, in the unit of the cost.
        iterations: at most so many.

    Raises:
        ValueError: a cost that is not finite, or a number that is not positive.
    """
    if epsilon <= 0 or iterations < 1:
        raise ValueError(f"sinkhorn: epsilon={epsilon}, iterations={iterations}; expected above 0, and at least 1")
    if cost.ndim < 2 or not bool(cost.isfinite().all()):
        raise ValueError(
            f"sinkhorn: the cost has shape {list(cost.shape)} and {int((~cost.isfinite()).sum())} entries that are "
            "NaN or infinite; expected [..., H, W] of finite numbers; look at the features that are compared"
        )
    kernel = -cost / epsilon
    height, width = cost.shape[-2:]
    rows, columns = kernel.new_zeros(*kernel.shape[:-1], 1), kernel.new_zeros(*kernel.shape[:-2], 1, width)
    for done in range(0, iterations, _ABSORBED):
        before = columns
        columns = -math.log(width) - (kernel + rows).logsumexp(-2, keepdim=True)
        rows = -math.log(height) - (kernel + columns).logsumexp(-1, keepdim=True)
        if float((columns - before).abs().max()) < _STILL * max(float(columns.abs().max()), 1.0):
            break
        more = min(_ABSORBED, iterations - done) - 1
        by_row, by_column = _scaled((kernel + rows + columns).exp(), more)
        rows, columns = rows + by_row.log(), columns + by_column.log().mT
    return (kernel + rows + columns).exp()


def _scaled(plan: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    """Factors of rows `[..., H, 1]` and columns `[..., W, 1]` after more iterations from a plan `[..., H, W]`."""
    height, width = plan.shape[-2:]
    by_row, by_column = plan.new_ones(*plan.shape[:-1], 1), plan.new_ones(*plan.shape[:-2], width, 1)
    for _ in range(iterations):
        by_column = 1 / (width * (plan.mT @ by_row))
        by_row = 1 / (height * (plan @ by_column))
    return by_row, by_column


def transport_rewards(cost: Tensor, epsilon: float = 0.01, iterations: int = 100) -> Tensor:
    """What each row pays under the plan of least cost, `r_i = -sum_j P_ij C_ij`, `[..., H]` for a cost `[..., H, W]`.

    The proxy reward of imitation by optimal transport (Dadashi et al. 2021; Haldar et al. 2022); see `sinkhorn`.
    """
    return -(sinkhorn(cost, epsilon, iterations) * cost).sum(-1)


def _check_features(owner: str, x: Tensor, y: Tensor) -> None:
    if min(x.ndim, y.ndim) < 2 or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"{owner}: features have shapes {list(x.shape)} and {list(y.shape)}; expected [..., H, D] and [..., W, D]"
        )
