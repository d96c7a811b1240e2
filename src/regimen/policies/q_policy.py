"""Policies of action values: the best action, or now and then another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn, Self, cast

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.models.q_network import ActionValues
from regimen.models.torsos import Observations, torso_for
from regimen.policies.acting import Acted
from regimen.policies.action import one_action_each
from regimen.rollout import Rollout


class QPolicy(nn.Module):
    """Takes the action of the largest value, or with probability `epsilon` one at random, all alike (epsilon-greedy).

    It is the network that `DQNObjective` trains.
    """

    def __init__(self, torso: nn.Module, head: nn.Module, *, epsilon: float = 0.05) -> None:
        """Make a policy of its parts.

        Args:
            torso: observations `[R, ...]` to features `[R, D]`.
            head: features to values `[R, A]`, an `ActionValues`.
            epsilon: default of the knob; it is 0 in evaluations.
        """
        super().__init__()
        self.torso, self.head = torso, head
        self.knobs = (Knob("epsilon", epsilon, 0.0, 1.0, evaluation=0.0, doc="share of actions taken at random"),)
        self.version = 0

    @classmethod
    def for_spaces(
        cls,
        observations: spaces.Space[Any],
        actions: spaces.Space[Any],
        *,
        reads: Sequence[str] | None = None,
        widths: Sequence[int] = (64, 64),
        dueling: bool = False,
        epsilon: float = 0.05,
    ) -> Self:
        """The policy that fits an environment's spaces (`EnvTask.spaces`).

        Args:
            observations, actions: of one copy; actions are `Discrete`.
            reads: of a table of observations, the entries that the policy sees; all by default.
            widths: of a fully connected torso.
            dueling: see `ActionValues`.
            epsilon: see above.

        Raises:
            ValueError: a space that no torso fits, or actions that are not discrete.
        """
        if not isinstance(actions, spaces.Discrete) or actions.start != 0:
            raise ValueError(
                f"QPolicy: no values for the actions {actions}; expected Discrete(n) from 0; numbers have a QNetwork"
            )
        torso = torso_for(observations, widths, reads)
        return cls(torso, ActionValues(cast(int, torso.width), int(actions.n), dueling=dueling), epsilon=epsilon)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.parameters()).device

    def values(self, observations: Observations) -> Tensor:
        """Values `[R, A]` of all actions at observations `[R, ...]`."""
        values: Tensor = self.head(self.torso(observations))
        return values

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies, without a log-probability; reads the knob `epsilon`."""
        values = self.values(observations.to(self.device))
        count = len(values)
        stray = torch.rand(count, generator=rng, device=rng.device) < knobs["epsilon"]
        random = torch.randint(values.shape[1], (count,), generator=rng, device=rng.device)
        return Acted(torch.where(stray.to(begins.device), random.to(begins.device), values.argmax(1).to(begins.device)))

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One action in each context, see `one_action_each`."""
        return one_action_each(self, contexts, knobs, rng)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> NoReturn:
        """Refused: actions are taken by their values."""
        raise NotImplementedError(
            "QPolicy takes actions by their values, which are no likelihoods; train it with DQNObjective, or use an "
            "ActionPolicy"
        )

    def extra_repr(self) -> str:
        """Settings, for a run's configuration."""
        return f"epsilon={self.knobs[0].default}"
