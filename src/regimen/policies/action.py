"""Controllers as policies: an environment step is a decision step."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, Self, cast

import gymnasium.spaces as spaces
import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.models.torsos import MLPTorso, Observations, torso_for
from regimen.policies.acting import Act, Acted, Actor, logprobs_of
from regimen.policies.base import acted_anew
from regimen.policies.distributions import ActionDistribution
from regimen.policies.few_rows import FewRows, suits, watched
from regimen.policies.heads import CategoricalHead, GaussianHead
from regimen.rollout import Rollout, Steps
from regimen.storage import load_tree, save_tree


@dataclass(frozen=True)
class ActionSteps:
    """The distribution over the action of every recorded step (a `StepDistribution`).

    Attributes:
        steps: the `R` steps that are described.
        actions: `[R, ...]`; features: `[R, D]`; described: the distribution at those steps.
    """

    steps: Steps
    actions: Tensor
    features: Tensor
    described: ActionDistribution

    @cached_property
    def hidden(self) -> Tensor:
        """`[B, T, D]`, features, 0 at steps left out; for critics and other heads."""
        return self.steps.spread(self.features)

    @cached_property
    def logprob(self) -> Tensor:
        """`[B, T]`."""
        return self.steps.spread(self.described.logprob(self.actions))

    def entropy(self) -> Tensor:
        """`[B, T]`, in nats."""
        return self.steps.spread(self.described.entropy())

    def kl(self, other: ActionSteps, estimator: str = "exact") -> Tensor:
        """`[B, T]`, KL(self || other).

        Raises:
            ValueError: an estimator other than `"exact"`.
        """
        if estimator != "exact":
            raise ValueError(f"KL estimator '{estimator}' is not known to an action policy; expected exact, k1, k2, k3")
        return self.steps.spread(self.described.kl(other.described))


class ActionPolicy(nn.Module):
    """A controller: a torso, perhaps a recurrent core, and a head over actions.

    It acts in environments (`EnvTask`), or once in each context (`sample`). A policy with memory is scored by replaying
    a sample from what it remembered before its first step (column `memory`), forgetting where an episode begins (step
    column `start`).
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
            backpropagate: gradients go back through the core no further than to the last step, counted from the
                sample's start, whose number is a multiple of this; through the whole sample by default.

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
        reads: Sequence[str] | None = None,
        widths: Sequence[int] = (64, 64),
        recurrent: int | None = None,
        backpropagate: int | None = None,
        squash: bool = False,
        learned_std: bool = False,
    ) -> Self:
        """The policy that fits an environment's spaces (`EnvTask.spaces`).

        Args:
            observations, actions: of one copy; actions are `Discrete`, or a `Box` of numbers `[A]`.
            reads: of a table of observations, the entries that the policy sees; all by default.
            widths: of a fully connected torso.
            recurrent: width of a recurrent core, if there should be one.
            backpropagate: see above.
            squash: keep numbers inside the bounds of their space by squashing. Without it they are Gaussian, and the
                environment clips them.
            learned_std: see `GaussianHead`.

        Raises:
            ValueError: a space that no torso or head fits.
        """
        torso = torso_for(observations, widths, reads)
        width = cast(int, torso.width)
        core = None if recurrent is None else nn.GRUCell(width, recurrent)
        width = width if recurrent is None else recurrent
        head: nn.Module
        if isinstance(actions, spaces.Discrete) and actions.start == 0:
            head = CategoricalHead(width, int(actions.n))
        elif isinstance(actions, spaces.Box) and len(actions.shape) == 1 and np.issubdtype(actions.dtype, np.floating):
            box = (actions.low, actions.high) if squash else None
            head = GaussianHead(width, actions.shape[0], box=box, learned_std=learned_std)
        else:
            raise ValueError(
                f"ActionPolicy: no head for the actions {actions}; expected Discrete(n) from 0, or a Box of numbers "
                "[A]; give a head of your own, or wrap the environment"
            )
        return cls(torso, head, core=core, backpropagate=backpropagate)

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def act(
        self,
        observations: Observations,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One action for each of `N` copies, on the device of `begins`.

        Args:
            observations: `[N, ...]`.
            memory: what it returned at the step before; `None` before the first.
            begins: bool `[N]`, copies at the start of an episode, of which it forgets the rest.
            knobs: `temperature`; 0 takes the likeliest action, which has no log-probability.
            rng: random stream, on the policy's device.
        """
        acted = self.acting(len(begins), knobs, rng)(observations, memory, begins)
        logprobs = logprobs_of(acted, rng.device)
        return replace(acted, logprobs=None if logprobs is None else logprobs.to(begins.device), described=None)

    def acting(self, count: int, knobs: Mapping[str, float], rng: torch.Generator) -> Act:
        """`act` for several steps, between which neither knobs nor weights move; log-probabilities wait."""
        temperature, quick = knobs["temperature"], self._quick(count)

        def act(observations: Observations, memory: Tensor | None, begins: Tensor) -> Acted:
            if quick is not None:
                described = quick(cast(Tensor, observations), temperature or 1.0)
            else:
                features = self.torso(observations.to(rng.device))
                if self.core is not None:
                    features = memory = self._remember(features, self._before(memory, features), begins.to(rng.device))
                described = self.head(features, temperature or 1.0)
            if temperature == 0:
                return Acted(described.mode().to(begins.device), None, memory)
            return Acted(described.sample(rng).to(begins.device), None, memory, described)

        return act

    def _quick(self, rows: int) -> FewRows | None:
        """The network for a few rows, if its parts are known well enough."""
        if self.core is not None or type(self.head) not in (CategoricalHead, GaussianHead) or watched(self.head):
            return None
        head = cast(CategoricalHead | GaussianHead, self.head)
        return FewRows(cast(MLPTorso, self.torso), head) if suits(self.torso, head.outputs, rows) else None

    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One action in each context, see `one_action_each`."""
        return one_action_each(self, contexts, knobs, rng)

    def propose(self, observations: Observations, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        """Actions `[R, ...]` at observations `[R, ...]`, drawn at temperature 1, and their log-probabilities `[R]`.

        Both with a gradient; see `propose` of the distributions.

        Raises:
            NotImplementedError: the actions are discrete, or the policy has memory.
        """
        if self.core is not None:
            raise NotImplementedError(
                "ActionPolicy.propose: a policy with memory is not told what it remembered before an observation; "
                "off-policy actor-critics need one without a core"
            )
        proposed: tuple[Tensor, Tensor] = self.head(self.torso(observations), 1.0).propose(rng)
        return proposed

    def reparameterised(self, rollout: Rollout, rng: torch.Generator) -> Rollout:
        """The same observations with proposed actions, which have a gradient, where they are learned from.

        Raises:
            NotImplementedError: the actions are discrete, or the policy has memory.
        """
        steps = Steps(rollout.loss_mask)
        actions, _ = self.propose(steps.of(rollout.observations), rng)
        return rollout.replace(actions=steps.spread(actions))

    def resample(self, rollout: Rollout, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """The same observations with actions drawn now where they are learned from; see `Batch.resampled`.

        Raises:
            ValueError: the policy has memory, or the temperature is 0.
        """
        if self.core is not None or knobs["temperature"] == 0:
            raise ValueError(
                f"ActionPolicy.resample: knob temperature = {knobs['temperature']:g}, "
                f"{'no' if self.core is None else 'a'} recurrent core; expected a policy without memory, above 0"
            )
        steps = Steps(rollout.loss_mask)
        begins = torch.ones(int(rollout.loss_mask.sum()), dtype=torch.bool, device=rng.device)
        acted = self.act(steps.of(rollout.observations), None, begins, knobs, rng)
        assert acted.logprobs is not None, "the temperature is above 0"
        return acted_anew(rollout, steps.spread(acted.actions), steps.spread(acted.logprobs), knobs)

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> ActionSteps:
        """The distribution at the recorded observations.

        Raises:
            ValueError: the rollout was sampled at temperature 0, or holds no observations.
        """
        if rollout.observations is None:
            raise ValueError("ActionPolicy.distribution: the rollout holds no observations; collect with an EnvTask")
        temperature = rollout.knob("temperature")
        if temperature is None:
            raise ValueError("ActionPolicy.distribution: the rollout was sampled without a knob 'temperature'")
        usual = bool((temperature == 1).all())
        if not usual and bool((temperature <= 0).any()):
            raise ValueError(
                "ActionPolicy.distribution: the rollout was sampled with knob temperature = 0 (the likeliest action), "
                "which has no log-probability; set temperature > 0 for training"
            )
        steps = Steps(rollout.mask if where is None else where)
        if self.core is None:
            features = self.torso(steps.of(rollout.observations))
        else:
            features = steps.of(self._replayed(rollout))
        scale = 1.0 if usual else steps.of_rows(temperature)[:, None]
        return ActionSteps(steps, steps.of(rollout.actions), features, self.head(features, scale))

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
        if memory is None:
            return features.new_zeros(len(features), self.core.hidden_size)
        return memory.to(features.device)

    def _remember(self, features: Tensor, memory: Tensor, begins: Tensor) -> Tensor:
        assert self.core is not None, "only asked where there is a core"
        remembered: Tensor = self.core(features, torch.where(begins[:, None], 0, memory))
        return remembered

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


def acting(policy: Actor, count: int, knobs: Mapping[str, float], rng: torch.Generator) -> Act:
    """How a policy acts in `count` copies for several steps, between which neither knobs nor weights move."""
    if isinstance(policy, ActionPolicy) and type(policy).act is ActionPolicy.act:
        return policy.acting(count, knobs, rng)

    def act(observations: Observations, memory: Tensor | None, begins: Tensor) -> Acted:
        return policy.act(observations, memory, begins, knobs, rng)

    return act


class _Placed(Actor, Protocol):
    """An actor with weights."""

    version: int

    @property
    def device(self) -> torch.device: ...


def one_action_each(policy: _Placed, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
    """One action in each context, a sample of one step: a contextual bandit.

    A context holds what is observed under the name `observation`.

    Raises:
        ValueError: the contexts have no such column.
    """
    seen = contexts.get("observation", None)
    if seen is None:
        raise ValueError(
            f"{type(policy).__name__}.sample: contexts have the columns {', '.join(contexts.keys()) or 'none'}, "
            "expected 'observation'; to act step by step in an environment, collect with an EnvTask"
        )
    begins = torch.ones(len(contexts), dtype=torch.bool, device=policy.device)
    acted = policy.act(seen, None, begins, knobs, rng)
    scored = {} if acted.logprobs is None else {"logprobs": acted.logprobs[:, None]}
    return Rollout.create(
        task="policy",
        group=torch.arange(len(contexts), device=policy.device),
        mask=begins[:, None],
        context=contexts,
        observations=seen.unsqueeze(1),
        actions=acted.actions[:, None],
        knobs=knobs,
        version=torch.full((len(contexts),), policy.version, device=policy.device),
        **scored,
    )
