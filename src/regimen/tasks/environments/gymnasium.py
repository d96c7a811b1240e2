"""Environments of gymnasium, through its own vector API."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from tensordict import TensorDict
from torch import Tensor

from regimen.knobs import Knob
from regimen.tasks.environments.base import Change, Observations


class GymnasiumVector:
    """Copies of a gymnasium environment, in this process or each in one of its own.

    The knobs in force at a reset are given to the environment as `options["knobs"]`; those it reads are declared with
    `reads`. A checkpoint holds the seed and the actions of every episode under way, and a resumed run plays them again:
    exact for every environment that is a function of its seed and its actions, and nothing is unpickled.
    """

    def __init__(
        self,
        make: Sequence[Callable[[], gymnasium.Env[Any, Any]]],
        *,
        reads: Sequence[Knob] = (),
        processes: bool = False,
    ) -> None:
        """Make the copies.

        Args:
            make: one function per copy.
            reads: the knobs that the environment reads at a reset.
            processes: give every copy a process of its own.

        Raises:
            ValueError: there are no copies.
        """
        if not make:
            raise ValueError("GymnasiumVector was given no environment to make; expected at least one function")
        kind: Any = AsyncVectorEnv if processes else SyncVectorEnv
        # Observations are copied into tensors here, so the vector environment need not copy them first.
        self._env = kind(list(make), copy=False, autoreset_mode=AutoresetMode.DISABLED)
        self.count, self.knobs = len(make), tuple(reads)
        self.observation_space, self.action_space = self._env.single_observation_space, self._env.single_action_space
        self._past: list[list[Any]] = [[] for _ in make]
        self._starts: list[tuple[int, dict[str, float]]] = [(0, {}) for _ in make]

    @classmethod
    def of(cls, name: str, count: int, *, reads: Sequence[Knob] = (), processes: bool = False, **settings: Any) -> Self:
        """Copies of an environment by its gymnasium name (`"CartPole-v1"`), each made with `settings`."""
        return cls([partial(gymnasium.make, name, **settings)] * count, reads=reads, processes=processes)

    def reset(self, rows: Tensor, seeds: Tensor, knobs: Mapping[str, float]) -> Observations:
        """Start new episodes in some copies; observations of all."""
        mine = {knob.name: float(knobs[knob.name]) for knob in self.knobs}
        wanted = [int(seed) % 2**31 for seed in seeds]
        for row in rows.nonzero().flatten().tolist():
            self._past[row], self._starts[row] = [], (wanted[row], mine)
        return self._start(rows, wanted, mine)

    def _start(self, rows: Tensor, seeds: Sequence[int], knobs: Mapping[str, float]) -> Observations:
        options = {"reset_mask": rows.numpy(force=True), "knobs": dict(knobs)}
        observations, _ = self._env.reset(seed=list(seeds), options=options)
        return _tensors(observations, self.count)

    def step(self, actions: Tensor) -> Change:
        """Take an action in every copy; a numeric entry of the environments' `info` becomes a column."""
        taken = actions.numpy(force=True)
        for past, action in zip(self._past, taken.tolist(), strict=True):
            past.append(action)
        observations, reward, terminated, truncated, info = self._env.step(taken)
        return Change(
            _tensors(observations, self.count),
            torch.from_numpy(np.asarray(reward, dtype=np.float32)),
            torch.from_numpy(np.array(terminated)),
            torch.from_numpy(np.array(truncated)),
            {name: torch.from_numpy(np.array(value)) for name, value in info.items() if _is_number(value, self.count)},
        )

    def state_dict(self) -> dict[str, Any]:
        """The seed, the knobs and the actions of every episode under way."""
        seeds, knobs = zip(*self._starts, strict=True)
        return {"seeds": list(seeds), "knobs": list(knobs), "past": [list(past) for past in self._past]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Play the episodes again up to where they were: the longest first, so that all end together."""
        self._starts = list(zip(state["seeds"], state["knobs"], strict=True))
        self._past = [list(past) for past in state["past"]]
        lengths = [len(past) for past in self._past]
        kind = self.action_space.dtype
        for left in range(max(lengths), -1, -1):
            # Copies that wait for their turn take any action meanwhile, and are started anew at every step.
            for row in (row for row, length in enumerate(lengths) if length <= left):
                only = torch.arange(self.count) == row
                self._start(only, state["seeds"], state["knobs"][row])
            if left == 0:
                return
            self._env.step(np.array([self._replayed(row, left) for row in range(self.count)], dtype=kind))

    def _replayed(self, row: int, left: int) -> Any:
        """The action of a copy with so many steps left to play; any, for one that has not begun."""
        past = self._past[row]
        return past[-left] if len(past) >= left else np.zeros(self.action_space.shape).tolist()

    def close(self) -> None:
        """Close the copies."""
        self._env.close()


def _tensors(observations: Any, count: int) -> Observations:
    if isinstance(observations, Mapping):
        return TensorDict({name: _tensors(value, count) for name, value in observations.items()}, batch_size=[count])
    array = np.array(observations)
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)


def _is_number(value: Any, count: int) -> bool:
    return isinstance(value, np.ndarray) and value.dtype.kind in "biuf" and value.shape[:1] == (count,)
