"""Environments of gymnasium, many copies at once."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium
import numpy as np
import torch
from gymnasium.error import DependencyNotInstalled
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.tasks.environments.base import Change, Observations
from regimen.tasks.environments.copies import Copies, Env

# Names that a package other than gymnasium registers when it is imported, and the extra that brings it.
_PACKAGES = {"ALE/": ("ale_py", "atari"), "MiniGrid-": ("minigrid", "minigrid"), "BabyAI-": ("minigrid", "minigrid")}


@dataclass(frozen=True)
class Gymnasium:
    """Makes copies of an environment by its gymnasium name: the `make` of an `EnvTask`.

    Attributes:
        name: such as `"CartPole-v1"`.
        settings: passed on to `gymnasium.make`.
        wrappers: put around every copy, in order.
        reads, tells, processes: see `GymnasiumVector`.
    """

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    wrappers: Sequence[Callable[[Env], Env]] = ()
    reads: Sequence[Knob] = ()
    tells: Sequence[str] = ()
    processes: bool = False

    def __call__(self, count: int) -> GymnasiumVector:
        """`count` copies.

        Raises:
            ImportError: the package that holds the environment is not installed; the extra is named.
        """
        return GymnasiumVector([self._one] * count, reads=self.reads, tells=self.tells, processes=self.processes)

    def _one(self) -> Env:
        for prefix, (package, extra) in _PACKAGES.items():
            if self.name.startswith(prefix):
                self._register(package, extra)
        try:
            env = gymnasium.make(self.name, **self.settings)
        except DependencyNotInstalled as error:
            if "mujoco" in str(error).lower():
                raise self._lacks("mujoco", "mujoco") from error
            raise
        for wrapper in self.wrappers:
            env = wrapper(env)
        return env

    def _register(self, package: str, extra: str) -> None:
        try:
            gymnasium.register_envs(importlib.import_module(package))
        except ImportError as error:
            raise self._lacks(package, extra) from error

    def _lacks(self, package: str, extra: str) -> ImportError:
        return ImportError(f"environment '{self.name}' needs {package}: pip install 'regimen-rl[{extra}]'")


class GymnasiumVector:
    """Copies of a gymnasium environment, in this process or each in one of its own.

    Actions that are numbers are clipped to the bounds of the action space on their way in; the policy's own actions
    stand in the rollout, so that its log-probabilities are of what it drew. Numbers in double precision come out in
    single.

    The knobs in force at a reset are given to the environment as `options["knobs"]`; those it reads are declared with
    `reads`. A checkpoint holds the seed and the actions of every episode under way, and a resumed run plays them again:
    exact for every environment that is a function of its seed and its actions, and nothing is unpickled.
    """

    def __init__(
        self,
        make: Sequence[Callable[[], Env]],
        *,
        reads: Sequence[Knob] = (),
        tells: Sequence[str] = (),
        processes: bool = False,
    ) -> None:
        """Make the copies.

        Args:
            make: one function per copy.
            reads: the knobs that the environment reads at a reset.
            tells: numbers in the environment's `info` that become columns; 0 in steps that do not tell them.
            processes: give every copy a process of its own.

        Raises:
            ValueError: there are no copies.
        """
        if not make:
            raise ValueError("GymnasiumVector was given no environment to make; expected at least one function")
        self._env: Any
        if processes:
            # Observations are copied into tensors here, so the vector environment need not copy them first.
            self._env = AsyncVectorEnv(list(make), copy=False, autoreset_mode=AutoresetMode.DISABLED)
        else:
            self._env = Copies(make, tells)
        self.count, self.knobs, self.device = len(make), tuple(reads), torch.device("cpu")
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space
        self._tells = tuple(tells)
        self._starts: list[tuple[int, dict[str, float]]] = [(0, {}) for _ in make]
        self._lengths = [0] * self.count
        self._actions: list[Any] = []

    def reset(self, rows: Tensor, seeds: Tensor, knobs: Mapping[str, float]) -> Observations:
        """Start new episodes in some copies; observations of all."""
        mine = {knob.name: float(knobs[knob.name]) for knob in self.knobs}
        for row in rows.nonzero().flatten().tolist():
            self._starts[row], self._lengths[row] = (int(seeds[row]) % 2**31, mine), 0
        # Only the actions of episodes that are under way are kept.
        del self._actions[: len(self._actions) - max(self._lengths)]
        return self._start(rows.numpy(force=True), mine)

    def _start(self, rows: Any, knobs: Mapping[str, float]) -> Observations:
        options: dict[str, Any] = {"reset_mask": rows}
        if knobs:
            options["knobs"] = dict(knobs)
        observations, _ = self._env.reset(seed=[seed for seed, _ in self._starts], options=options)
        return _tensors(observations, self.count)

    def step(self, actions: Tensor) -> Change:
        """Take an action in every copy."""
        taken = actions.numpy(force=True)
        if isinstance(self.action_space, gymnasium.spaces.Box):
            taken = np.clip(taken, self.action_space.low, self.action_space.high).astype(self.action_space.dtype)
        self._actions.append(taken)
        self._lengths = [length + 1 for length in self._lengths]
        observations, reward, terminated, truncated, info = self._env.step(taken)
        return Change(
            _tensors(observations, self.count),
            torch.from_numpy(np.asarray(reward, dtype=np.float32)),
            torch.from_numpy(np.array(terminated, dtype=bool)),
            torch.from_numpy(np.array(truncated, dtype=bool)),
            {name: self._told(info, name) for name in self._tells},
        )

    def _told(self, info: Mapping[str, Any], name: str) -> Tensor:
        return torch.from_numpy(np.asarray(info.get(name, np.zeros(self.count)), dtype=np.float32))

    def state_dict(self) -> dict[str, Any]:
        """The seed, the knobs and the actions of every episode under way."""
        seeds, knobs = zip(*self._starts, strict=True)
        actions = torch.from_numpy(np.stack(self._actions)) if self._actions else None
        return {"seeds": list(seeds), "knobs": list(knobs), "lengths": list(self._lengths), "actions": actions}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the episodes again up to where they were: the longest first, so that all end together."""
        self._starts = list(zip(state["seeds"], state["knobs"], strict=True))
        self._lengths = list(state["lengths"])
        self._actions = [] if state["actions"] is None else list(state["actions"].numpy())
        # Those of copies that have not begun cannot be told, so all begin once before each does in its turn.
        everyone, over = np.ones(self.count, dtype=bool), np.zeros(self.count, dtype=bool)
        self._start(everyone, self._starts[0][1])
        for left in range(len(self._actions), -1, -1):
            # Copies that wait for their turn repeat what they did before it, and begin anew whenever that ends.
            for row, length in enumerate(self._lengths):
                if length == left or (length < left and over[row]):
                    self._start(np.arange(self.count) == row, self._starts[row][1])
            if left:
                _, _, terminated, truncated, _ = self._env.step(self._actions[-left])
                over = np.array(terminated, dtype=bool) | np.array(truncated, dtype=bool)

    def close(self) -> None:
        """Close the copies, and end their processes."""
        self._env.close()


def _tensors(observations: Any, count: int) -> Observations:
    if isinstance(observations, Mapping):
        return TensorDict({name: _tensors(value, count) for name, value in observations.items()}, batch_size=[count])
    array = np.array(observations)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
