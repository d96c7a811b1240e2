"""What a memory is, and the one that keeps the newest rollout only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch

from regimen.rollout import Rollout

EMPTY = "the memory is empty: collect before you learn"


@runtime_checkable
class Memory(Protocol):
    """Keeps rollouts to learn from."""

    def __len__(self) -> int:
        """How many samples there are to draw from."""
        ...

    def add(self, rollout: Rollout) -> None:
        """Take in an iteration's rollout."""
        ...

    def newest(self) -> Rollout:
        """The rollout that came last."""
        ...

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples, drawn uniformly with replacement."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything kept, for an exact resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


class NewestRollout:
    """Keeps the newest rollout only: on-policy learning.

    With `unit="step"`, `sample` draws single steps of those that are learned from, as a `ReplayMemory` of transitions
    does, instead of whole samples.
    """

    def __init__(self, unit: Literal["sample", "step"] = "sample") -> None:
        if unit not in ("sample", "step"):
            raise ValueError(f"NewestRollout: unit is '{unit}', expected 'sample' or 'step'")
        self.unit = unit
        self._newest: Rollout | None = None

    def __len__(self) -> int:
        return 0 if self._newest is None else len(self._newest)

    def add(self, rollout: Rollout) -> None:
        """Forget the one before."""
        self._newest = rollout

    def newest(self) -> Rollout:
        """The rollout that came last."""
        if self._newest is None:
            raise ValueError(EMPTY)
        return self._newest

    def sample(self, size: int, rng: torch.Generator) -> Rollout:
        """`size` samples (or steps) of the newest rollout, with replacement."""
        newest = self.newest() if self.unit == "sample" else self.newest().unrolled(self.newest().loss_mask)
        index = torch.randint(len(newest), (size,), generator=rng, device=rng.device)
        return newest[index]

    def state_dict(self) -> dict[str, Any]:
        """Nothing: the next iteration collects anew."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
