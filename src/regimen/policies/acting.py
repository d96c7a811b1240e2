"""Acting for a stretch of steps: what is settled before the first, and what waits until after the last."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from regimen.models.torsos import Observations
from regimen.policies.distributions import ActionDistribution


@dataclass(frozen=True)
class Acted:
    """What a policy does in one step of `N` copies.

    Attributes:
        actions: `[N, ...]`.
        logprobs: `[N]`; none at temperature 0, or of a deterministic policy.
        memory: `[N, ...]`, what a policy with memory keeps for its next step.
        described: what the actions were drawn from, in the place of `logprobs`: see `logprobs_of`.
    """

    actions: Tensor
    logprobs: Tensor | None = None
    memory: Tensor | None = None
    described: ActionDistribution | None = None


@runtime_checkable
class Actor(Protocol):
    """A policy that acts step by step."""

    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies; see `ActionPolicy.act`."""
        ...


Act: TypeAlias = Callable[[Observations, Tensor | None, Tensor], Acted]
"""`Actor.act` under knobs and with a random stream that are settled."""


def logprobs_of(steps: Sequence[Acted], device: torch.device) -> Tensor | None:
    """Log-probabilities `[N, T]` of the actions of `T` steps, those that wait all at once, on their policy's device."""
    described = [step.described for step in steps if step.described is not None]
    if described:
        actions = torch.cat([step.actions for step in steps]).to(device)
        return described[0].cat(described).logprob(actions).view(len(steps), -1).t()
    known = [step.logprobs for step in steps if step.logprobs is not None]
    return torch.stack(known, 1) if known else None
