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


def joined(parts: Sequence[Acted]) -> Acted:
    """What was done in several steps, one after the other: `[T N, ...]`; of several, without memory."""
    if len(parts) == 1:
        return parts[0]
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    described = [part.described for part in parts if part.described is not None]
    return Acted(
        torch.cat([part.actions for part in parts]),
        torch.cat(logprobs) if logprobs else None,
        described=described[0].cat(described) if described else None,
    )


def logprobs_of(acted: Acted, device: torch.device) -> Tensor | None:
    """Log-probabilities `[R]` of the actions of steps, computed now if they waited, on their policy's device."""
    return acted.logprobs if acted.described is None else acted.described.logprob(acted.actions.to(device))
