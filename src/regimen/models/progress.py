"""Networks that estimate what each action of a sample contributes to its final reward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from regimen.functions.attribution import action_ends
from regimen.models.torsos import MLPTorso
from regimen.rollout import Rollout


class ProgressEstimator(nn.Module):
    """Contributions `c_i = head(h_i)` of the hidden state at the last step of every action (SPA-RL, section 3.2).

    It is trained by `ReturnDecompositionObjective`, and asked by `RewardRedistribution`.

    Attributes:
        misfit: `[]`, see `MeasureMisfit`; inf before it.
    """

    misfit: Tensor

    def __init__(self, encoder: nn.Module, width: int, hidden: int | None = None) -> None:
        """Make it.

        Args:
            encoder: a rollout to hidden states `[B, T, width]`.
            width: of the hidden states.
            hidden: width of a layer before the last one; none by default.
        """
        super().__init__()
        self.encoder = encoder
        layers = [] if hidden is None else [nn.Linear(width, hidden), nn.Tanh()]
        self.head = nn.Sequential(*layers, nn.Linear(width if hidden is None else hidden, 1))
        self.register_buffer("misfit", torch.tensor(torch.inf))

    def forward(self, rollout: Rollout) -> Tensor:
        """Contributions `[B, T]`, 0 but on the last steps of actions."""
        states = self.encoder(rollout)
        said: Tensor = self.head(states.to(next(self.head.parameters()).dtype)).squeeze(-1)
        return torch.where(action_ends(rollout.mask, rollout.loss_mask, rollout.segment), said, 0)


class ActionEncoder(nn.Module):
    """What was observed in a step and what was done: layers, and perhaps a recurrent core over the sample's steps.

    For samples that are whole episodes, which a core reads from their start.

    Attributes:
        width: of the hidden states.
    """

    def __init__(
        self, torso: Any, actions: int, widths: Sequence[int] = (64, 64), *, recurrent: int | None = None
    ) -> None:
        """Make it.

        Args:
            torso: observations `[R, ...]` to features `[R, torso.width]`.
            actions: how many there are; or the size of an action, if actions are vectors of numbers.
            widths: of layers on both together.
            recurrent: width of a core, if there should be one.
        """
        super().__init__()
        self.torso, self.actions = torso, actions
        self.layers = MLPTorso(cast(int, torso.width) + actions, widths)
        self.core = None if recurrent is None else nn.GRU(self.layers.width, recurrent, batch_first=True)
        self.width = self.layers.width if recurrent is None else recurrent

    def forward(self, rollout: Rollout) -> Tensor:
        """Hidden states `[B, T, width]`."""
        features = self.torso(rollout.observations.flatten(0, 1))
        acted = rollout.actions.flatten(0, 1)
        if not acted.is_floating_point():
            acted = nn.functional.one_hot(acted, self.actions)
        states = self.layers(torch.cat([features, acted.to(features.dtype)], 1)).unflatten(0, rollout.mask.shape)
        if self.core is not None:
            states = self.core(states)[0]
        return cast(Tensor, states)


class PolicyEncoder(nn.Module):
    """The hidden states of a policy of one's own, as of a language model that was cloned to begin with.

    The state of a step is the one before it, so that of a turn's last token has read the turn up to there. (For a
    controller it has not seen the action: use an `ActionEncoder`.)
    """

    def __init__(self, policy: Any) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, rollout: Rollout) -> Tensor:
        """Hidden states `[B, T, D]`."""
        states: Tensor = self.policy.distribution(rollout, rollout.mask).hidden
        return states
