"""The pendulum that is to be swung up, many copies at once, and a script that does it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor

from regimen.functions.categorical import row_uniform
from regimen.knobs import Knob
from regimen.policies.acting import Acted
from regimen.tasks.environments.base import Observations
from regimen.tasks.environments.tensor.base import TensorEnv

TORQUE, SPEED = 2.0, 8.0
"""The largest torque (N m) and speed (rad/s)."""
_GRAVITY, _STEP_S = 10.0, 0.05


class Pendulum(TensorEnv):
    """The dynamics, reward and limit of gymnasium's `Pendulum-v1`: mass and length 1, an episode of 200 steps.

    The copies see the cosine and sine of the angle (0 is upright) and the speed; an action `[1]` is a torque, clipped
    to [-2, 2]. The reward is minus `angle^2 + 0.1 speed^2 + 0.001 torque^2`. An episode is cut off, never over.
    """

    def __init__(self, count: int, *, limit: int = 200, device: torch.device | str = "cpu") -> None:
        """See `TensorEnv`."""
        super().__init__(count, limit=limit, device=device)
        most = np.array([1, 1, SPEED], dtype=np.float32)
        self.observation_space = spaces.Box(-most, most)
        self.action_space = spaces.Box(-TORQUE, TORQUE, (1,))

    def start(self, seeds: Tensor, knobs: Mapping[str, float]) -> dict[str, Tensor]:
        """Any angle, and a speed between -1 and 1."""
        angle = (2 * row_uniform(seeds, -2) - 1) * math.pi
        return {"angle": angle.float(), "speed": (2 * row_uniform(seeds, -3) - 1).float()}

    def move(self, actions: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, dict[str, Tensor]]:
        """One step of 0.05 s."""
        angle, speed = self.state["angle"], self.state["speed"]
        torque = actions.reshape(-1).clamp(-TORQUE, TORQUE)
        cost = wrapped(angle).square() + 0.1 * speed.square() + 0.001 * torque.square()
        faster = speed + (1.5 * _GRAVITY * angle.sin() + 3 * torque) * _STEP_S
        faster = faster.clamp(-SPEED, SPEED)
        changed = {"angle": angle + faster * _STEP_S, "speed": faster}
        return changed, -cost, torch.zeros_like(self.seeds, dtype=torch.bool), {}

    def observe(self) -> Observations:
        """`[N, 3]`."""
        angle = self.state["angle"]
        return torch.stack([angle.cos(), angle.sin(), self.state["speed"]], 1)


class SwingUp:
    """A script for the pendulum: it pumps energy while the pendulum hangs and balances it near the top, with noise.

    The torque is `-(8 angle + 2 speed)` within 0.5 rad of the top, else `-0.15 e sign(speed)`, where `e` is the energy
    above that of standing upright.
    """

    knobs: tuple[Knob, ...] = ()

    def __init__(self, noise: float = 0.3) -> None:
        """`noise` is the deviation of what is added to the torque."""
        self.noise = noise

    def act(
        self,
        observations: Any,
        memory: Tensor | None,
        begins: Tensor,
        knobs: Mapping[str, float],
        rng: torch.Generator,
    ) -> Acted:
        """One torque for each of `N` copies."""
        cosine, sine, speed = observations.unbind(1)
        angle = torch.atan2(sine, cosine)
        energy = 0.5 * speed.square() + 1.5 * _GRAVITY * (cosine - 1)
        torque = torch.where(angle.abs() < 0.5, -(8 * angle + 2 * speed), -0.15 * energy * speed.sign())
        noise = torch.randn(len(torque), generator=rng, device=rng.device).to(torque)
        return Acted((torque.clamp(-TORQUE, TORQUE) + self.noise * noise).clamp(-TORQUE, TORQUE)[:, None])


def wrapped(angle: Tensor) -> Tensor:
    """The same angle in [-pi, pi)."""
    return (angle + math.pi) % (2 * math.pi) - math.pi
