"""A schedule: one knob along a curve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from regimen.controllers.base import Moment, Situation
from regimen.controllers.curves import Curve


@dataclass(frozen=True)
class Schedule:
    """Sets a knob to `curve(step)` before each iteration's samples are collected."""

    knob: str
    curve: Curve
    moment: Moment = "before_collect"

    @property
    def moves(self) -> tuple[str, ...]:
        """The one knob."""
        return (self.knob,)

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """The curve's value at this step."""
        return {self.knob: self.curve(situation.step)}

    def state_dict(self) -> dict[str, Any]:
        """A schedule remembers nothing: it is a function of the step."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
