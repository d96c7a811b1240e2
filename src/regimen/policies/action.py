"""Controllers as policies: an environment step is a decision step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import gymnasium.spaces as spaces
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.models.torsos import Observations, orthogonal, torso_for
from regimen.policies.distributions import ActionDistribution, Categorical, Gaussian, SquashedGaussian
from regimen.rollout import Rollout
from regimen.storage import load_tree, save_tree


class CategoricalHead(nn.Module):
    """Features to one of `actions`."""

    def __init__(self, width: int, actions: int, gain: float = 0.01) -> None:
        super().__init__()
        self.logits = orthogonal(nn.Linear(width, actions), gain)

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Categorical:
        """Logits divided by the temperature."""
        return Categorical(self.logits(features) / temperature)


class GaussianHead(nn.Module):
    """Features to a Gaussian over `size` numbers; its deviation is a parameter, or depends on the features."""

    def __init__(
        self,
        width: int,
        size: int,
        *,
        log_std: float = 0.0,
        learned_std: bool = False,
        squash: bool = False,
        gain: float = 0.01,
    ) -> None:
        """Make the head.

        Args:
            width: of the features.
            size: of an action.
            log_std: at the start, the logarithm of the deviation.
            learned_std: the deviation depends on the features, with its logarithm kept in [-5, 2].
            squash: into (-1, 1).
            gain: of the mean's weights.
        """
        super().__init__()
        self.mean, self.squash = orthogonal(nn.Linear(width, size), gain), squash
        self.scale = orthogonal(nn.Linear(width, size), gain) if learned_std else None
        self.log_std = nn.Parameter(torch.full((size,), log_std)) if not learned_std else None

    def forward(self, features: Tensor, temperature: Tensor | float = 1.0) -> Gaussian | SquashedGaussian:
        """The deviation is multiplied by the temperature."""
        mean = self.mean(features)
        log_std = self.log_std if self.scale is None else self.scale(features).clamp(-5, 2)
        assert log_std is not None, "one of the two is there"
        std = log_std.exp().expand_as(mean) * temperature
        return SquashedGaussian(mean, std) if self.squash else Gaussian(mean, std)


@dataclass(frozen=True)
class Acted:
    """What a policy does in one step of `N` copies.

    Attributes:
        actions: `[N, ...]`; logprobs: `[N]`, none at temperature 0; memory: `[N, H]` of a recurrent policy.
    """

    actions: Tensor
    logprobs: Tensor | None
    memory: Tensor | None


@dataclass(frozen=True)
class ActionSteps:
    """The distribution over the action of every recorded step (a `StepDistribution`).

    Attributes:
        where: bool `[B, T]`, the `R` steps that are described, in row order.
        actions: `[R, ...]`; features: `[B, T, D]`; described: the distribution at those steps.
    """

    where: Tensor
    actions: Tensor
    features: Tensor
    described: ActionDistribution

    @property
    def hidden(self) -> Tensor:
        """`[B, T, D]`, features, for critics and other heads."""
        return self.features

    @cached_property
    def logprob(self) -> Tensor:
        """`[B, T]`."""
        return self._spread(self.described.logprob(self.actions))

    def entropy(self) -> Tensor:
        """`[B, T]`, in nats."""
        return self._spread(self.described.entropy())

    def kl(self, other: ActionSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL(self || other).

        Raises:
            ValueError: an estimator other than `"exact"`.
        """
        if estimator != "exact":
            raise ValueError(f"KL estimator '{estimator}' is not known to an action policy; expected exact, k1, k2, k3")
        return self._spread(self.described.kl(other.described))

    def _spread(self, values: Tensor) -> Tensor:
        return torch.zeros(self.where.shape, device=values.device).masked_scatter(self.where, values)


class ActionPolicy(nn.Module):
    """A controller: a torso, perhaps a recurrent core, and a head over actions.

    It acts in environments (`EnvTask`). A recurrent policy is scored by replaying a sample from what it remembered
    before its first step (column `memory`), forgetting where an episode begins (column `start`).
    """

    def __init__(
        self,
        torso: nn.Module,
        head: nn.Module,
        *,
        core: nn.GRUCell | None = None,
        backpropagate: int | None = None,
    ) -> None:
        """Make a policy of its parts.

        Args:
            torso: observations `[R, ...]` to features `[R, D]`.
            head: features and temperature to an `ActionDistribution`.
            core: a recurrent cell from the torso's features to its own.
            backpropagate: steps that gradients go back through the core; all by default.

        Raises:
            ValueError: `backpropagate` is below 1, or there is no core.
        """
        super().__init__()
        if backpropagate is not None and (core is None or backpropagate < 1):
            raise ValueError(f"ActionPolicy: backpropagate={backpropagate}; expected at least 1, and a recurrent core")
        self.torso, self.head, self.core, self.backpropagate = torso, head, core, backpropagate
        self.knobs = (
            Knob("temperature", 1.0, 0.0, evaluation=0.0, doc="spread of the actions; 0 takes the likeliest"),
        )
        self.version = 0

    @classmethod
    def for_spaces(
        cls,
        observations: spaces.Space[Any],
        actions: spaces.Space[Any],
        *,
        widths: Sequence[int] = (64, 64),
        recurrent: int | None = None,
        squash: bool = False,
        learned_std: bool = False,
    ) -> Self:
        """The policy that fits an environment's spaces.

        Args:
            observations, actions: of one copy; actions are `Discrete`, or a `Box` of numbers.
            widths: of a fully connected torso.
            recurrent: width of a recurrent core, if there should be one.
            squash, learned_std: see `GaussianHead`.

        Raises:
            ValueError: a space that no torso or head fits.
        """
        torso = torso_for(observations, widths)
        width = cast(int, torso.width)
        core = None if recurrent is None else nn.GRUCell(width, recurrent)
        width = width if recurrent is None else recurrent
        if isinstance(actions, spaces.Discrete):
            return cls(torso, CategoricalHead(width, int(actions.n)), core=core)
        if isinstance(actions, spaces.Box) and len(actions.shape) == 1:
            head = GaussianHead(width, actions.shape[0], squash=squash, learned_std=learned_std)
            return cls(torso, head, core=core)
        raise ValueError(f"ActionPolicy: no head for actions of kind {type(actions).__name__} ({actions}); give a head")

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.parameters()).device

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """Refused: it acts in an environment, step by step."""
        raise NotImplementedError("ActionPolicy samples by acting in an environment; collect with an EnvTask")

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies.

        Args:
            observations: `[N, ...]`.
            memory: what it returned at the step before.
            begins: bool `[N]`, copies at the start of an episode, of which it forgets the rest.
            knobs: `temperature`; 0 takes the likeliest action, which has no log-probability.
            rng: random stream.
        """
        features = self.torso(observations.to(self.device))
        if self.core is not None:
            memory = self._before(memory, features)
            features = memory = self._remember(features, memory, begins.to(self.device))
        temperature = knobs["temperature"]
        described = self._head()(features, temperature or 1.0)
        if temperature == 0:
            return Acted(described.mode().to(begins.device), None, memory)
        if isinstance(described, SquashedGaussian):
            actions, logprobs = described.sample_with_logprob(rng)
        else:
            actions = described.sample(rng)
            logprobs = described.logprob(actions)
        return Acted(actions.to(begins.device), logprobs.to(begins.device), memory)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> ActionSteps:
        """The distribution at the recorded observations.

        Raises:
            ValueError: the rollout was sampled at temperature 0, or holds no observations.
        """
        if rollout.observations is None:
            raise ValueError("ActionPolicy.distribution: the rollout holds no observations; collect with an EnvTask")
        temperature = rollout.knobs["temperature"]
        if bool((temperature <= 0).any()):
            raise ValueError(
                "ActionPolicy.distribution: the rollout was sampled with knob temperature = 0 (the likeliest action), "
                "which has no log-probability; set temperature > 0 for training"
            )
        where = rollout.mask if where is None else where
        row, step = where.nonzero(as_tuple=True)
        features, described = self._features(rollout, where)
        spread = temperature[row]
        scale = spread[:, None] if not bool((spread == 1).all()) else 1.0
        return ActionSteps(where, rollout.actions[row, step], features, self._head()(described, scale))

    def _features(self, rollout: Rollout, where: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, D]` features, 0 where they are not asked for, and those `[R, D]` that are."""
        if self.core is None:
            found = self.torso(rollout.observations[where])
            wide = found.new_zeros(*where.shape, found.shape[-1])
            return wide.masked_scatter(where[..., None], found), found
        features = self._replayed(rollout)
        return features, features[where]

    def _replayed(self, rollout: Rollout) -> Tensor:
        """`[B, T, H]`: the recurrent core over the samples, from what it remembered before them."""
        seen = self.torso(rollout.observations.flatten(0, 1)).unflatten(0, rollout.mask.shape)
        start = rollout.get("start", torch.zeros_like(rollout.mask))
        memory = self._before(rollout.get("memory"), seen[:, 0])
        states = []
        for step in range(rollout.steps):
            if self.backpropagate and step % self.backpropagate == 0:
                memory = memory.detach()
            memory = self._remember(seen[:, step], memory, start[:, step])
            states.append(memory)
        return torch.stack(states, 1)

    def _before(self, memory: Tensor | None, features: Tensor) -> Tensor:
        assert self.core is not None, "only asked where there is a core"
        return features.new_zeros(len(features), self.core.hidden_size) if memory is None else memory

    def _remember(self, features: Tensor, memory: Tensor, begins: Tensor) -> Tensor:
        assert self.core is not None, "only asked where there is a core"
        remembered: Tensor = self.core(features, torch.where(begins[:, None], 0, memory))
        return remembered

    def _head(self) -> Callable[[Tensor, Tensor | float], Any]:
        return cast(Callable[[Tensor, Tensor | float], Any], self.head)

    def logprob(self, rollout: Rollout) -> Tensor:
        """Differentiable log-probability `[B, T]` of the recorded actions."""
        return self.distribution(rollout).logprob

    def save(self, path: Path | str) -> None:
        """Write the weights to one safetensors file, whole or not at all."""
        save_tree(Path(path), {"weights": self.state_dict()})

    def load(self, path: Path | str) -> Self:
        """Read weights that `save` wrote into this policy, and return it."""
        self.load_state_dict(load_tree(Path(path))["weights"])
        return self

    def reference(self) -> ActionPolicy:
        """A frozen policy with the present weights."""
        return copy.deepcopy(self).requires_grad_(False).eval()
