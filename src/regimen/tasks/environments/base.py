"""What an environment is: `count` copies side by side, stepped together, started one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, runtime_checkable

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.models.torsos import Observations as Observations


@dataclass(frozen=True)
class Change:
    """What one step did to every copy.

    Attributes:
        observations: after the step; of a copy whose episode ended, the last one of that episode.
        reward: `[N]`.
        terminated: bool `[N]`, the episode ended and nothing comes after it.
        truncated: bool `[N]`, it was cut off, at a time limit say, and its value goes on.
        info: further columns `[N, ...]`, such as `success`; the same ones at every step.
    """

    observations: Observations
    reward: Tensor
    terminated: Tensor
    truncated: Tensor
    info: Mapping[str, Tensor] = field(default_factory=dict)


@runtime_checkable
class VectorEnv(Protocol):
    """Copies of an environment. Nothing restarts by itself: whoever steps it resets the copies that ended.

    An episode is a function of its seed, the knobs at its reset and its actions, whatever the other copies do.

    Attributes:
        count: how many copies.
        device: where the tensors are that it takes and gives.
        observation_space, action_space: of one copy, as gymnasium describes them.
    """

    count: int
    device: torch.device
    observation_space: Any
    action_space: Any

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that it reads, at a reset."""
        ...

    def reset(self, rows: Tensor, seeds: Tensor, knobs: Mapping[str, float]) -> Observations:
        """Start new episodes in some copies (bool `[N]`), each from its seed (int64 `[N]`); observations of all."""
        ...

    def step(self, actions: Tensor) -> Change:
        """Take an action `[N, ...]` in every copy. A copy whose episode has ended must have been reset."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Where every copy is, for an exact resume: tensors, numbers, texts, lists and dictionaries."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put every copy back there."""
        ...

    def close(self) -> None:
        """Free what the copies hold (processes, windows)."""
        ...


MakeEnv: TypeAlias = Callable[[int], VectorEnv]
"""A number of copies to an environment of that many."""
