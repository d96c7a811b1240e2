"""Curves: pure functions from a stage's step (0, 1, 2, ...) to a number."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Curve = Callable[[int], float]


@dataclass(frozen=True)
class Constant:
    """The same value at every step."""

    value: float

    def __call__(self, step: int) -> float:
        """`value`."""
        return self.value


@dataclass(frozen=True)
class Linear:
    """From `start` to `end` in `total` steps, then `end`."""

    start: float
    end: float
    total: int

    def __post_init__(self) -> None:
        _positive("Linear", total=self.total)

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.start + (self.end - self.start) * min(step / self.total, 1.0)


@dataclass(frozen=True)
class Exponential:
    """`start * gamma ** (step / every)`, in whole drops if `staircase`, never below `floor`."""

    start: float
    gamma: float
    every: float = 1
    staircase: bool = False
    floor: float | None = None

    def __post_init__(self) -> None:
        _positive("Exponential", every=self.every)
        if not 0 < self.gamma <= 1:
            raise ValueError(f"Exponential: gamma is {self.gamma}, expected in (0, 1]")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        power = step // self.every if self.staircase else step / self.every
        value = self.start * self.gamma**power
        return value if self.floor is None else max(value, self.floor)


@dataclass(frozen=True)
class Steps:
    """`n_drops` equal drops from `start` to `end`, every `total / (n_drops + 1)` steps.

    Equal in ratio (`kind="exponential"`) or in difference (`"linear"`); no drops is a constant.
    """

    start: float
    end: float
    n_drops: int
    total: int
    kind: Literal["exponential", "linear"] = "exponential"

    def __post_init__(self) -> None:
        _positive("Steps", total=self.total)
        if self.end > self.start or self.n_drops < 0 or (self.n_drops == 0 and self.end != self.start):
            raise ValueError(
                f"Steps: start={self.start}, end={self.end}, n_drops={self.n_drops}; expected end <= start, and "
                "equal if there are no drops"
            )
        if self.kind == "exponential" and self.end <= 0:
            raise ValueError(f"Steps: end is {self.end}; drops of equal ratio need values above 0")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        if self.n_drops == 0:
            return self.start
        drops = min(step * (self.n_drops + 1) // self.total, self.n_drops)
        if self.kind == "linear":
            return self.start + (self.end - self.start) * drops / self.n_drops
        return float(self.start * (self.end / self.start) ** (drops / self.n_drops))


@dataclass(frozen=True)
class Piecewise:
    """Values from given steps on, `points = [(step, value), ...]`; joined by lines if `linear`."""

    points: Sequence[tuple[int, float]]
    linear: bool = False

    def __post_init__(self) -> None:
        at = [step for step, _ in self.points]
        if not at or at != sorted(set(at)):
            raise ValueError(f"Piecewise: steps are {at}, expected at least one, increasing")

    def __call__(self, step: int) -> float:
        """The value at a step; the first value before the first point."""
        before = [point for point in self.points if point[0] <= step]
        if not before:
            return self.points[0][1]
        left = before[-1]
        if not self.linear or len(before) == len(self.points):
            return left[1]
        right = self.points[len(before)]
        return left[1] + (right[1] - left[1]) * (step - left[0]) / (right[0] - left[0])


@dataclass(frozen=True)
class Alternating:
    """Two values in turn: in each window of steps `first` for its `share`, then `then`."""

    window: int
    share: float
    first: float
    then: float

    def __post_init__(self) -> None:
        _positive("Alternating", window=self.window)
        if not 0 <= self.share <= 1:
            raise ValueError(f"Alternating: share is {self.share}, expected in [0, 1]")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        return self.first if step % self.window < self.share * self.window - 1e-9 else self.then


@dataclass(frozen=True)
class Cosine:
    """From `baseline` to 1 along half a cosine in `period` steps, `cycles` times in turn; then 1 (VPL's annealing).

    A cycle ends at 1, and the step after begins the next one.
    """

    period: int
    cycles: int = 1
    baseline: float = 0.0

    def __post_init__(self) -> None:
        _positive("Cosine", period=self.period, cycles=self.cycles)
        if not 0 <= self.baseline <= 1:
            raise ValueError(f"Cosine: baseline is {self.baseline}, expected in [0, 1]")

    def __call__(self, step: int) -> float:
        """The value at a step."""
        if step > self.period * self.cycles:
            return 1.0
        within = (step - 1) % self.period + 1 if step > 0 else 0
        return self.baseline + (1 - self.baseline) * (1 - math.cos(math.pi * within / self.period)) / 2


def _positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        if value <= 0:
            raise ValueError(f"{owner}: {name} is {value}, expected above 0")
