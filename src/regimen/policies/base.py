"""What a policy is to the rest of the library: something that samples, and where possible scores, its samples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout


class StepDistribution(Protocol):
    """A policy's distribution over the action of every recorded step, differentiable in its weights."""

    @property
    def logprob(self) -> Tensor:
        """`[B, T]`, log-probability of the recorded actions; 0 at steps left out."""
        ...

    def entropy(self) -> Tensor:
        """`[B, T]`, entropy of each step's distribution, in nats."""
        ...

    def kl(self, other: Any, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL(self || other), `other` of the same policy kind on the same rollout."""
        ...


@runtime_checkable
class Policy(Protocol):
    """Anything that samples answers to contexts.

    `distribution` is optional in substance: a planner or a deterministic policy raises `NotImplementedError`
    with a sentence that names it, and objectives that need a likelihood pass that on.
    """

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that sampling reads."""
        ...

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One sample per context, with the behaviour's log-probabilities where it has any."""
        ...

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> StepDistribution:
        """The distribution over the rollout's actions, at the steps `where` (bool `[B, T]`, default `mask`)."""
        ...


def logprob(policy: Policy, rollout: Rollout) -> Tensor:
    """Differentiable log-probability `[B, T]` of a rollout's actions under a policy."""
    return policy.distribution(rollout).logprob


def acted_anew(rollout: Rollout, actions: Any, logprobs: Tensor, knobs: Mapping[str, float]) -> Rollout:
    """A rollout with other actions, as a policy draws them under the knobs in force now."""
    now = {name: torch.full_like(value, knobs[name]) for name, value in rollout.knobs.items() if name in knobs}
    return rollout.replace(actions=actions, logprobs=logprobs, knobs={**dict(rollout.knobs.items()), **now})
