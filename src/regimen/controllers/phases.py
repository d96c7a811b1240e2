"""Phases that follow each other round and round, each until an update has taken so many steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from regimen.controllers.base import Moment, Situation


@dataclass(frozen=True)
class Phase:
    """One of the phases.

    Attributes:
        knobs: their values while it lasts, such as the shares `mixture/<task>`.
        update: whose gradient steps are counted.
        steps: it ends after so many of them,
        attempts: or after so many iterations,
        over: or when this says so.
    """

    knobs: Mapping[str, float]
    update: str
    steps: int
    attempts: int
    over: Callable[[], bool] | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.attempts < self.steps:
            raise ValueError(
                f"Phase of update '{self.update}': steps={self.steps}, attempts={self.attempts}; expected at least 1 "
                "step, and no fewer attempts than steps"
            )


class Phases:
    """Gives knobs the values of one phase after another, the first again after the last.

    The first phase's values must be in force at the start: give them to the stage (`knobs=phases.first`).
    """

    moment: Moment = "after_learn"

    def __init__(self, phases: Sequence[Phase]) -> None:
        """Begin with the first; `ValueError` unless there are two or more, of the same knobs."""
        names = {frozenset(phase.knobs) for phase in phases}
        if len(phases) < 2 or len(names) > 1:
            shown = [sorted(phase.knobs) for phase in phases]
            raise ValueError(
                f"Phases: the phases give the knobs {shown}; expected two phases or more, of the same ones"
            )
        self.phases = tuple(phases)
        self._place, self._began, self._attempts, self._taken = 0, 0.0, 0, {phase.update: 0.0 for phase in phases}

    @property
    def first(self) -> Mapping[str, float]:
        """The values of the first phase."""
        return self.phases[0].knobs

    @property
    def moves(self) -> tuple[str, ...]:
        """The knobs of the phases."""
        return tuple(self.first)

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """The values of the phase that the next iteration belongs to."""
        for update in self._taken:
            self._taken[update] = float(situation.metrics.get(f"{update}/steps", self._taken[update]))
        self._attempts += 1
        phase = self.phases[self._place]
        done = self._taken[phase.update] - self._began >= phase.steps
        if done or self._attempts >= phase.attempts or (phase.over is not None and phase.over()):
            self._place, self._attempts = (self._place + 1) % len(self.phases), 0
            self._began = self._taken[self.phases[self._place].update]
        return self.phases[self._place].knobs

    def state_dict(self) -> dict[str, Any]:
        """Which phase it is, and how far."""
        return {"place": self._place, "began": self._began, "attempts": self._attempts, "taken": dict(self._taken)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self._place, self._attempts = int(state["place"]), int(state["attempts"])
        self._began, self._taken = float(state["began"]), dict(state["taken"])
