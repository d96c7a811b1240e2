"""Copies of a gymnasium environment in this process, stepped one after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import gymnasium
import numpy as np
from gymnasium.vector.utils import concatenate, create_empty_array

Env: TypeAlias = gymnasium.Env[Any, Any]


class Copies:
    """As much of a gymnasium vector environment as a `GymnasiumVector` asks of one, at little more than its steps.

    Nothing restarts by itself. Of what the environments tell, only the numbers named in `tells` are passed on.
    """

    def __init__(self, make: Sequence[Callable[[], Env]], tells: Sequence[str]) -> None:
        """`ValueError` if the copies do not have the same spaces."""
        self.envs = [one() for one in make]
        self.single_observation_space = self.envs[0].observation_space
        self.single_action_space = self.envs[0].action_space
        for env in self.envs[1:]:
            mine, first = (env.observation_space, env.action_space), self.envs[0]
            if mine != (first.observation_space, first.action_space):
                raise ValueError(
                    f"the copies of an environment have different spaces: {first.observation_space} and "
                    f"{first.action_space}, and {mine[0]} and {mine[1]}; make them alike, or tasks of their own"
                )
        self._tells, self._seen = tuple(tells), [None] * len(self.envs)

    def reset(self, seed: Sequence[int], options: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Restart the copies of `options["reset_mask"]`, each from its seed; observations of all."""
        others = {name: value for name, value in options.items() if name != "reset_mask"}
        for copy in np.flatnonzero(options["reset_mask"]).tolist():
            self._seen[copy], _ = self.envs[copy].reset(seed=seed[copy], options=dict(others))
        return self._observations(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Take an action in every copy; what was seen, paid, terminated, truncated and told."""
        if isinstance(self.single_action_space, gymnasium.spaces.Discrete):
            # Python's own numbers are what environments check and compute with fastest.
            actions = actions.tolist()
        changes = [env.step(action) for env, action in zip(self.envs, actions, strict=True)]
        self._seen, reward, terminated, truncated, infos = map(list, zip(*changes, strict=True))
        told = {name: [info.get(name, 0) for info in infos] for name in self._tells}
        return self._observations(), reward, terminated, truncated, told

    def _observations(self) -> Any:
        space = self.single_observation_space
        if isinstance(space, gymnasium.spaces.Box):
            return np.array(self._seen, dtype=space.dtype)
        return concatenate(space, self._seen, create_empty_array(space, len(self.envs)))

    def close(self) -> None:
        """Close them."""
        for env in self.envs:
            env.close()
