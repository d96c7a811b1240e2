"""The clipped surrogate of PPO and GRPO."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from regimen.functions.aggregate import Aggregate, mean_of
from regimen.objectives.base import Batch, Objective
from regimen.rollout import Steps


def clipped_surrogate(
    logprob: Tensor, behaviour_logprob: Tensor, advantage: Tensor, clip: float, clip_high: float | None = None
) -> tuple[Tensor, Tensor]:
    """Loss per step `max(-A rho, -A clip(rho, 1 - clip, 1 + clip_high))` (Schulman et al. 2017, eq. 7).

    Args:
        logprob: the policy's log-probabilities, any shape.
        behaviour_logprob: those recorded while sampling, same shape.
        advantage: same shape.
        clip: range below 1, and above it unless `clip_high` is given (DAPO's clip-higher).
        clip_high: range above 1.

    Returns:
        The loss per step and the ratio `rho`, both of the same shape.

    Raises:
        ValueError: unequal shapes or a clip range that is not positive.
    """
    if not logprob.shape == behaviour_logprob.shape == advantage.shape:
        raise ValueError(
            f"clipped_surrogate: shapes {list(logprob.shape)}, {list(behaviour_logprob.shape)} and "
            f"{list(advantage.shape)} differ"
        )
    _check_range("clipped_surrogate", clip, clip_high)
    ratio = (logprob - behaviour_logprob).exp()
    # The gain is the smaller of the two, and what is clipped has no gradient: a bound for each step, above the ratio of
    # what was good and below that of what was bad. A ratio that is not a number is not hidden by it.
    gain, bound = advantage * ratio, advantage + _reach(advantage, clip, clip if clip_high is None else clip_high)
    return -torch.where(gain > bound, bound, gain), ratio


def _reach(advantage: Tensor, low: float, high: float) -> Tensor:
    """How far the gain may go beyond the advantage."""
    if low == high:
        return low * advantage.abs()
    return high * advantage.clamp(min=0) - low * advantage.clamp(max=0)


def _check_range(owner: str, clip: float, clip_high: float | None) -> None:
    if clip <= 0 or (clip_high is not None and clip_high <= 0):
        raise ValueError(f"{owner}: clip={clip}, clip_high={clip_high}; expected > 0")


def _standardized(advantage: Tensor, batch: Batch) -> Tensor:
    """Advantages `[R]` less the mean of the whole minibatch's, over their deviation (a single step's is 0)."""
    whole = batch.whole
    every = advantage if whole is None or whole is batch.rollout else Steps(whole.loss_mask).of(whole.advantages)
    std, mean = torch.std_mean(every, correction=0)
    return (advantage - mean) / (std + 1e-8)


@dataclass(frozen=True)
class ClippedSurrogateObjective(Objective):
    """The clipped surrogate on the rollout's advantages, for any policy with log-probabilities.

    Attributes:
        clip, clip_high: see `clipped_surrogate`.
        aggregate, horizon: how steps are weighted, see `aggregate_weights`: `"sequence"` is GRPO's, `"token"` is
            DAPO's and PPO's mean over all steps, `"constant"` Dr. GRPO's.
        member: the member that is trained.
        standardize: subtract the advantages' mean over the minibatch's steps and divide by their deviation, as the
            first implementation of PPO does (Engstrom et al. 2020), whatever the credit has done.
    """

    clip: float = 0.2
    clip_high: float | None = None
    aggregate: Aggregate = "sequence"
    horizon: int | None = None
    member: str = "policy"
    standardize: bool = False
    name: str = "surrogate"

    def __post_init__(self) -> None:
        _check_range("ClippedSurrogateObjective", self.clip, self.clip_high)

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Sum of the weighted loss per step.

        Metrics: `ratio_deviation`, the largest `|rho - 1|`; `clip_share`, of steps with a ratio outside the clip
        range; `approx_kl`, the k3 estimate of the KL from the behaviour policy.
        """
        of = batch.steps.of
        advantage = of(batch.require("advantages", "ClippedSurrogateObjective", "give the stage a credit"))
        if self.standardize:
            advantage = _standardized(advantage, batch)
        behaviour = batch.require(
            "logprobs",
            "ClippedSurrogateObjective",
            "sample with a stochastic policy (a flow policy needs knob noise_level > 0)",
        )
        logprob = batch.distribution(self.member).logprob
        per_step, ratio = clipped_surrogate(of(logprob), of(behaviour), advantage, self.clip, self.clip_high)
        return batch.aggregated(per_step, self.aggregate, self.horizon), self._metrics(ratio.detach())

    def _metrics(self, ratio: Tensor) -> dict[str, Tensor]:
        change, high = ratio - 1, self.clip if self.clip_high is None else self.clip_high
        size = change.abs()
        outside = size > self.clip if high == self.clip else (change < -self.clip) | (change > high)
        return {
            "ratio_deviation": size.amax() if len(ratio) else ratio.sum(),
            "clip_share": mean_of(outside),
            "approx_kl": mean_of(change - ratio.log()),
        }
