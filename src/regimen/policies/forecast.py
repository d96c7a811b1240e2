"""Forecasters: policies whose steps are positions to come (PPT, Lin et al. 2024).

A context holds `past [P, 2]`; actions are the positions that follow, `[T, 2]`. The networks do not know where they
are: give positions relative to the last one that is seen.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from regimen.knobs import Knob
from regimen.models.trajectory import DestinationNetwork, NextPositionNetwork, TrajectoryNetwork
from regimen.policies.action import ActionSteps
from regimen.policies.distributions import Gaussian
from regimen.rollout import Rollout, Steps


class NextPositionForecaster(nn.Module):
    """A Gaussian around the next position, given all before it; of unit deviation.

    It scores and does not sample: it is trained, and teaches, on recorded tracks.
    """

    knobs: tuple[Knob, ...] = ()

    def __init__(self, network: NextPositionNetwork) -> None:
        super().__init__()
        self.network = network

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> ActionSteps:
        """The distribution of every step, given the true steps before it."""
        past, actions = _track(rollout, "NextPositionForecaster")
        following, states = self.network(torch.cat([past, actions[:, :-1]], 1))
        steps, seen = Steps(rollout.mask if where is None else where), past.shape[1]
        mean = steps.of(following[:, seen - 1 :])
        features = steps.of(states[:, seen - 1 :])
        return ActionSteps(steps, steps.of(actions), features, Gaussian(mean, torch.ones_like(mean)))


@dataclass(frozen=True)
class Destinations:
    """Where a sample may end.

    Attributes:
        where: bool `[B, T]`, the steps that are described.
        destinations: `[B, K, 2]`.
        state: `[B, D]`, what they come from.
    """

    where: Tensor
    destinations: Tensor
    state: Tensor

    @property
    def hidden(self) -> Tensor:
        """`[B, T, D]`: the state, the same at every step that is described, 0 elsewhere."""
        return self.state[:, None] * self.where[..., None]


class DestinationForecaster(nn.Module):
    """`K` places where a sample may end; it names them and neither samples nor scores."""

    knobs: tuple[Knob, ...] = ()

    def __init__(self, network: DestinationNetwork) -> None:
        super().__init__()
        self.network = network

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> Destinations:
        """The destinations of each sample's past."""
        past, _ = _track(rollout, "DestinationForecaster")
        return Destinations(rollout.mask if where is None else where, *self.network(past))


@dataclass(frozen=True)
class ForecastSteps(ActionSteps):
    """The Gaussian of every step on the way to one destination.

    Attributes:
        destinations: `[B, K, 2]`, all that there are.
    """

    destinations: Tensor


class TrajectoryForecaster(nn.Module):
    """Names `K` destinations and the way to each; a sample takes one of them at random, with Gaussian noise.

    Which one is chosen is no decision of the policy: all are equally likely. A sample's column `mode` holds it, and it
    is scored on the way to that destination. Recorded tracks have no such column; they are described on the way to the
    destination that is nearest to their end.
    """

    def __init__(self, destinations: DestinationNetwork, trajectory: TrajectoryNetwork, std: float = 0.1) -> None:
        """Make a policy of two networks.

        Args:
            destinations, trajectory: of as many steps.
            std: of the noise around a position, in the positions' unit, at temperature 1.

        Raises:
            ValueError: the networks look ahead by different numbers of steps, or `std` is not positive.
        """
        super().__init__()
        if destinations.future != trajectory.future or std <= 0:
            raise ValueError(
                f"TrajectoryForecaster: destinations in {destinations.future} steps, trajectories of "
                f"{trajectory.future}, std={std}; expected as many steps, and a deviation above 0"
            )
        self.destinations, self.trajectory, self.std = destinations, trajectory, std
        self.knobs = (Knob("temperature", 1.0, 0.0, evaluation=0.0, doc="spread around a way; 0 is the way itself"),)
        self.version = 0

    @property
    def device(self) -> torch.device:
        """Where the policy's weights are."""
        return next(self.parameters()).device

    @torch.no_grad()
    def forecast(self, past: Tensor) -> Tensor:
        """The ways to all destinations, `[B, K, T, 2]`, for pasts `[B, P, 2]`."""
        destinations, _ = self.destinations(past)
        count = destinations.shape[1]
        ways, _ = self.trajectory(past.repeat_interleave(count, 0), destinations.flatten(0, 1))
        unflattened: Tensor = ways.unflatten(0, (-1, count))
        return unflattened

    @torch.no_grad()
    def sample(self, contexts: TensorDict, knobs: Mapping[str, float], rng: torch.Generator) -> Rollout:
        """One trajectory for each context, to a destination drawn at random; column `mode` says which."""
        past, temperature = contexts["past"], knobs["temperature"]
        mode = torch.randint(self.destinations.count, (len(past),), generator=rng, device=self.device)
        destinations, _ = self.destinations(past)
        mean, _ = self.trajectory(past, _pick(destinations, mode))
        noise = (
            torch.randn(mean.shape, generator=rng, device=self.device) if temperature > 0 else torch.zeros_like(mean)
        )
        actions = mean + self.std * temperature * noise
        scored = {}
        if temperature > 0:
            scored["logprobs"] = self._around(mean, torch.full_like(mean, temperature)).logprob(actions)
        return Rollout.create(
            task="policy",
            group=torch.arange(len(past), device=self.device),
            mask=torch.ones(mean.shape[:2], dtype=torch.bool, device=self.device),
            context=contexts,
            knobs=knobs,
            columns={"mode": mode},
            version=torch.full((len(past),), self.version, device=self.device),
            actions=actions,
            **scored,
        )

    def distribution(self, rollout: Rollout, where: Tensor | None = None) -> ForecastSteps:
        """The Gaussian of every step, on the way to the sample's destination.

        Raises:
            ValueError: the rollout holds no `past` or no actions, or was sampled at temperature 0.
        """
        past, actions = _track(rollout, "TrajectoryForecaster")
        temperature = rollout.knob("temperature")
        if temperature is None or bool((temperature <= 0).any()):
            raise ValueError(
                "TrajectoryForecaster.distribution: the rollout was sampled without noise (knob temperature 0, or no "
                "such knob), so that it has no log-probability; set temperature > 0 for training"
            )
        destinations, _ = self.destinations(past)
        mode = rollout.get("mode")
        if mode is None:
            mode = (destinations - actions[:, -1:]).norm(dim=2).argmin(1)
        mean, states = self.trajectory(past, _pick(destinations, mode))
        steps = Steps(rollout.mask if where is None else where)
        scale = steps.of_rows(temperature)[:, None].expand(-1, 2)
        return ForecastSteps(
            steps, steps.of(actions), steps.of(states), self._around(steps.of(mean), scale), destinations
        )

    def _around(self, mean: Tensor, temperature: Tensor) -> Gaussian:
        return Gaussian(mean, self.std * temperature)

    def reference(self) -> TrajectoryForecaster:
        """A frozen policy with the present weights."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    def extra_repr(self) -> str:
        """Settings, for `repr` and the run's configuration."""
        return f"std={self.std}"


def _pick(destinations: Tensor, mode: Tensor) -> Tensor:
    """The destination `[B, 2]` of each sample's mode."""
    return destinations[torch.arange(len(mode), device=mode.device), mode]


def _track(rollout: Rollout, owner: str) -> tuple[Tensor, Tensor]:
    """The past `[B, P, 2]` and the positions that follow, `[B, T, 2]`."""
    past, actions = rollout.context.get("past", None), rollout.actions
    if past is None or actions is None:
        raise ValueError(
            f"{owner}: the rollout has {'no' if actions is None else 'its'} actions and the context "
            f"{', '.join(rollout.context.keys()) or 'nothing'}; expected actions [B, T, 2], and 'past' [B, P, 2]"
        )
    return past, actions
