"""Acting at random."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import gymnasium.spaces as spaces
import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.models.torsos import Observations
from regimen.policies.acting import Acted


class UniformPolicy:
    """Takes every action alike: for what a memory begins with, and as the floor that a policy must rise above."""

    knobs: tuple[Knob, ...] = ()

    def __init__(self, actions: spaces.Space[Any]) -> None:
        """`actions` are `Discrete`, or a `Box` of numbers `[A]` within bounds; `ValueError` for another space."""
        self.actions = actions
        bounded = isinstance(actions, spaces.Box) and len(actions.shape) == 1 and actions.is_bounded()
        if not bounded and not (isinstance(actions, spaces.Discrete) and actions.start == 0):
            raise ValueError(
                f"UniformPolicy: the actions are {actions}; expected Discrete(n) from 0, or a bounded Box of shape [A]"
            )

    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies, with its log-probability."""
        count = len(begins)
        if isinstance(self.actions, spaces.Discrete):
            number = int(self.actions.n)
            actions = torch.randint(number, (count,), generator=rng, device=rng.device).to(begins.device)
            return Acted(actions, torch.full((count,), 1 / number, device=begins.device).log())
        box = cast(spaces.Box, self.actions)
        low, high = (torch.as_tensor(bound, dtype=torch.float32, device=begins.device) for bound in (box.low, box.high))
        share = torch.rand(count, len(low), generator=rng, device=rng.device).to(begins.device)
        return Acted(low + share * (high - low), -(high - low).log().sum().expand(count))
