"""Flow matching: supervised training of a velocity field."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.flow import expand_as, interpolate, velocity_target
from regimen.objectives.base import Batch, Objective

NoiseLevels = Callable[[int, torch.Generator], Tensor]


def logit_normal(count: int, rng: torch.Generator) -> Tensor:
    """Times `sigmoid(N(0, 1))`, `[count]` (Esser et al. 2024, section 3.1)."""
    return torch.randn(count, generator=rng, device=rng.device).sigmoid()


@dataclass(frozen=True)
class FlowMatchingObjective(Objective):
    """`E || v(x_sigma, sigma, c) - (noise - data) ||^2`, a mean over dimensions (Lipman et al. 2023).

    Attributes:
        column: the side column that holds the data `[B, ...]`.
        times: how noise levels are drawn.
        member: a flow policy in the cast.
        condition_dropout: share of samples trained with the null condition (for classifier-free guidance).
    """

    column: str = "image"
    times: NoiseLevels = logit_normal
    member: str = "policy"
    condition_dropout: float = 0.0
    name: str = "flow_matching"

    def __post_init__(self) -> None:
        if not 0 <= self.condition_dropout <= 1:
            raise ValueError(f"FlowMatchingObjective: condition_dropout={self.condition_dropout}, expected in [0, 1]")

    def loss(self, batch: Batch) -> Tensor:
        """Mean squared error over the slice, scaled by its share of the minibatch."""
        policy, data = batch.member(self.member), batch.rollout[self.column]
        noise = torch.randn(data.shape, generator=batch.rng, device=data.device)
        sigma = self.times(len(data), batch.rng)
        conditioning = policy.condition(batch.rollout.context)
        if self.condition_dropout > 0:
            drop = torch.rand(len(data), generator=batch.rng, device=data.device) < self.condition_dropout
            conditioning = _where(drop, policy.denoiser.unconditional(conditioning), conditioning)
        predicted = policy.velocity(interpolate(data, noise, sigma), sigma, conditioning)
        return (predicted - velocity_target(data, noise)).square().mean() * batch.share


def _where(rows: Tensor, a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of one conditioning at some rows (bool `[B]`), of another elsewhere."""
    tensors = {key: value for key, value in b.items() if isinstance(value, Tensor)}
    return {key: torch.where(expand_as(rows, value), a[key], value) for key, value in tensors.items()}
