"""What a controller is: it looks at metrics and moves knobs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

Moment = Literal["before_collect", "after_judge", "after_learn"]


@dataclass(frozen=True)
class Situation:
    """What a controller may look at.

    Attributes:
        step: iterations of this stage that are complete (before collecting: of those so far).
        total: iterations that the stage will have, if it knows.
        metrics: this iteration's metrics so far; numbers or arrays, keyed `<what>/<task or component>`.
        knobs: the values in force.
    """

    step: int
    total: int | None
    metrics: Mapping[str, Any]
    knobs: Mapping[str, float]


@runtime_checkable
class Controller(Protocol):
    """Moves named knobs.

    Attributes:
        moves: the knobs that it moves; two controllers never move the same one.
        moment: when it acts in an iteration.
    """

    @property
    def moment(self) -> Moment:
        """When in an iteration it acts."""
        ...

    @property
    def moves(self) -> tuple[str, ...]:
        """The knobs that it moves."""
        ...

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """New values of some of the knobs in `moves`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...
