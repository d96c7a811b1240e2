"""Credit from a critic of actions: how much better an action is than what the policy does on average."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout, Steps


def critic_advantage(q: Tensor, v: Tensor) -> Tensor:
    """`min_j Q_j - min_j V_j`, `[R]`, of critics `[K, R]` each (ArCHer, section 4.2, as in its code).

    Raises:
        ValueError: other shapes.
    """
    if q.ndim != 2 or q.shape[1:] != v.shape[1:]:
        raise ValueError(f"critic_advantage: q {list(q.shape)}, v {list(v.shape)}; expected [K, R] each")
    return q.amin(0) - v.amin(0)


@dataclass(frozen=True)
class CriticAdvantage:
    """The advantage that a `DoubleCritic` gives to every action, without a look at what came of it.

    It needs no reward, so it is for actions that no environment has answered (`Resampled`), and for recorded ones
    alike.

    Attributes:
        critic: member, `critic.both(observations [R, ...], actions [R, ...]) -> (q [K, R], v [K, R])`.
    """

    critic: str = "critic"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    @torch.no_grad()
    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The rollout with `advantages [B, T]`, 0 at steps that are not learned from.

        Raises:
            ValueError: the cast has no such critic.
        """
        if self.critic not in cast:
            raise ValueError(
                f"CriticAdvantage: the cast has no member '{self.critic}' (it has: {', '.join(cast)}); add a "
                "DoubleCritic to it"
            )
        steps = Steps(rollout.loss_mask)
        q, v = cast[self.critic].both(steps.of(rollout.observations), steps.of(rollout.actions))
        return rollout.replace(advantages=steps.spread(critic_advantage(q, v)))
