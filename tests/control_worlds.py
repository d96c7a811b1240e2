"""Small environments that tests of control share: their returns and their optima are known."""

from __future__ import annotations

from typing import Any

import gymnasium
import gymnasium.spaces as spaces
import numpy as np
import torch
from torch import Tensor

from regimen.rollout import Rollout


class Clock(gymnasium.Env[Any, Any]):
    """Pays 1 at every step, and stops after `length` steps (or that of the knob `length`), drawn if it is a range.

    What is seen is (steps taken, the length, the action before). It stops by termination, or by a time limit.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    action_space = spaces.Discrete(2)

    def __init__(self, length: int | tuple[int, int] = 5, limit: bool = False) -> None:
        self.length, self.limit = length, limit

    def _seen(self, action: float = 0.0) -> Any:
        return np.array([self.taken, self.now, action])

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        low, high = self.length if isinstance(self.length, tuple) else (self.length, self.length)
        self.now = int((options or {}).get("knobs", {}).get("length", self.np_random.integers(low, high + 1)))
        self.taken = 0
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        over = self.taken >= self.now
        told = {"success": 1.0} if over else {}
        return self._seen(float(action)), 1.0, over and not self.limit, over and self.limit, told


class Mixed(gymnasium.Env[Any, Any]):
    """Shows a table of a vector and a number, drawn at random in every step; episodes of random length."""

    observation_space = spaces.Dict({"vector": spaces.Box(-10, 10, (2,), np.float32), "cell": spaces.Discrete(3)})
    action_space = spaces.Discrete(2)

    def _seen(self) -> dict[str, Any]:
        return {"vector": self.place.astype(np.float32), "cell": int(self.np_random.integers(3))}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2)
        return self._seen(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.place = self.place + (2 * action - 1) + self.np_random.normal(size=2)
        return self._seen(), float(self.place[0]), bool(self.np_random.random() < 0.1), False, {}


class Identity(gymnasium.Env[Any, Any]):
    """What is seen is the right action: `kinds` of them, or a number. Right pays 1, or minus the square of the miss."""

    def __init__(self, kinds: int | None = 3, limit: int = 8) -> None:
        self.kinds, self.limit = kinds, limit
        number = spaces.Box(-1, 1, (1,), np.float32)
        self.observation_space: Any = number if kinds is None else spaces.Discrete(kinds)
        self.action_space: Any = number if kinds is None else spaces.Discrete(kinds)

    def _draw(self) -> Any:
        if self.kinds is None:
            self.right: Any = self.np_random.uniform(-0.5, 0.5, 1).astype(np.float32)
        else:
            self.right = int(self.np_random.integers(self.kinds))
        return self.right

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.taken = 0
        return self._draw(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.right) if self.kinds else -float(np.square(action - self.right).sum())
        self.taken += 1
        return self._draw(), reward, False, self.taken >= self.limit, {}


class Remember(gymnasium.Env[Any, Any]):
    """The first observation tells which action is right in the last step; in between there is nothing to see."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, delay: int = 3) -> None:
        self.delay = delay

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.right, self.taken = int(self.np_random.integers(2)), 0
        return np.array([2 * self.right - 1, 0], np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.taken += 1
        last = self.taken > self.delay
        seen = np.array([0, self.taken == self.delay], np.float32)
        return seen, float(last and action == self.right), last, False, {}


class Coin:
    """A policy that takes 0 or 1 at random, and so needs no weights."""

    knobs = ()

    def act(self, observations: Any, memory: Any, begins: Tensor, knobs: Any, rng: torch.Generator) -> Any:
        from regimen.policies.acting import Acted

        actions = torch.randint(2, begins.shape, generator=rng)
        return Acted(actions, torch.full(begins.shape, 0.5).log())


def same(a: Rollout, b: Rollout) -> None:
    """Every tensor of two rollouts is equal, but for the times."""
    left, right = (dict(r.data.items(True, True)) for r in (a, b))
    assert left.keys() == right.keys()
    for name, value in left.items():
        if name not in ("started_at", "finished_at"):
            assert torch.equal(value, right[name]), name
