"""Several answers at once: the best of them is drawn to the truth, and they keep apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.objectives.base import Batch, Objective


def best_of_k(points: Tensor, target: Tensor) -> Tensor:
    """Distance from the target to the nearest of `K` points, `[B]` (PPT's reconstruction loss; a winner takes all).

    Args:
        points: `[B, K, D]`.
        target: `[B, D]`.

    Raises:
        ValueError: the shapes do not fit, or there is no point.
    """
    if points.ndim != 3 or not points.shape[1] or target.shape != points[:, 0].shape:
        raise ValueError(
            f"best_of_k: points {list(points.shape)}, target {list(target.shape)}; expected [B, K, D] with K at least "
            "1, and [B, D]"
        )
    return (points - target[:, None]).norm(dim=2).amin(1)


def pairwise_repulsion(points: Tensor, scale: float) -> Tensor:
    """Mean of `exp(-d^2 / scale)` over the pairs of `K` points, `[B]`: 1 where all coincide, 0 far apart.

    Args:
        points: `[B, K, D]`; of a single point it is 0.
        scale: in squares of the points' unit.

    Raises:
        ValueError: a scale that is not positive.
    """
    if scale <= 0:
        raise ValueError(f"pairwise_repulsion: scale is {scale}, expected above 0")
    count = points.shape[1]
    if count < 2:
        return points.new_zeros(len(points))
    first, second = torch.triu_indices(count, count, 1, device=points.device)
    squared = (points[:, first] - points[:, second]).square().sum(2)
    return (-squared / scale).exp().mean(1)


@dataclass(frozen=True)
class DestinationObjective(Objective):
    """Distance of the last recorded action from the nearest of a member's destinations.

    Attributes:
        member: its distribution has `destinations [B, K, 2]`, as that of a `DestinationForecaster` or a
            `TrajectoryForecaster`.
    """

    member: str = "policy"
    name: str = "destination"

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the samples whose last step is learned from, of all samples."""
        actions = batch.require("actions", "DestinationObjective", "give rows with actions: the positions to come")
        return (best_of_k(_destinations(batch, self.member), actions[:, -1]) * _share(batch)).sum()


@dataclass(frozen=True)
class DiversityObjective(Objective):
    """How near a member's destinations are to one another; the term that keeps them apart.

    Attributes:
        scale: in squares of the destinations' unit, see `pairwise_repulsion`.
        member: as in `DestinationObjective`.
    """

    scale: float = 1.0
    member: str = "policy"
    name: str = "diversity"

    def __post_init__(self) -> None:
        if self.scale <= 0:
            raise ValueError(f"DiversityObjective: scale is {self.scale}, expected above 0")

    def loss(self, batch: Batch) -> Tensor:
        """Mean over the samples whose last step is learned from, of all samples."""
        return (pairwise_repulsion(_destinations(batch, self.member), self.scale) * _share(batch)).sum()


def _destinations(batch: Batch, member: str) -> Tensor:
    described = batch.distribution(member)
    if not hasattr(described, "destinations"):
        raise ValueError(
            f"member '{member}' ({type(batch.member(member)).__name__}) names no destinations; give a "
            "DestinationForecaster or a TrajectoryForecaster"
        )
    return described.destinations


def _share(batch: Batch) -> Tensor:
    """`[B]`: each sample's part of a mean over the minibatch."""
    return batch.weights("constant", 1)[:, -1]
