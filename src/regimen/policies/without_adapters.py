"""The base weights of a policy with adapters, as a reference that costs no memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Self

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.policies.token_steps import TokenSteps
from regimen.rollout import Rollout

if TYPE_CHECKING:
    from regimen.policies.token import TokenPolicy


class WithoutAdapters(nn.Module):
    """The base weights of a policy with adapters, as a frozen policy: the same network with its adapters off."""

    def __init__(self, policy: TokenPolicy) -> None:
        super().__init__()
        # A list keeps the policy out of this module's own parameters.
        self._policy = [policy]
        self.version = policy.version

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the policy."""
        return self._policy[0].knobs

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One answer per context."""
        policy = self._policy[0]
        with policy.network.adapters_disabled():
            return policy.sample(contexts, knobs, rng)

    @torch.no_grad()
    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> TokenSteps:
        """See `TokenPolicy.distribution`; without gradient."""
        policy = self._policy[0]
        with policy.network.adapters_disabled():
            return replace(policy.distribution(rollout, where), output=self._logits)

    @torch.no_grad()
    def _logits(self, states: Tensor) -> Tensor:
        """Logits `[N, V]`; the output layer may have adapters."""
        network = self._policy[0].network
        with network.adapters_disabled():
            return network.logits(states)

    def logprob(self, rollout: Rollout) -> Tensor:
        """Log-probability `[B, T]` of the policy's own tokens."""
        return self.distribution(rollout).logprob

    def reference(self) -> Self:
        """Itself."""
        return self
