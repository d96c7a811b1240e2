"""The mixture of tasks: fixed shares, or shares by a metric of each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from regimen.controllers.base import Moment, Situation

Family = Literal["mixture", "weight"]


class TaskMixture:
    """Moves the knobs `mixture/<task>` (or `weight/<task>`): shares that add up to 1.

    By a metric in [0, 1] of each task, shares are proportional to `(1 - metric) ** (1 / temperature)`: tasks in which
    little is left to do (a success rate), or that are unlike the others (an outlier score), are drawn more seldom. A
    task keeps its last metric while it is not drawn; as long as one has none, the knobs are left as they are.
    """

    moment: Moment = "after_learn"

    def __init__(
        self,
        tasks: Sequence[str],
        *,
        by: str | None = None,
        shares: Sequence[float] | None = None,
        temperature: float = 1.0,
        least: float = 0.0,
        family: Family = "mixture",
    ) -> None:
        """Make the controller.

        Args:
            tasks: names.
            by: a component of the reward, whose mean over a task's samples is the metric; or the name of any other
                metric, with `{task}` in it.
            shares: of the tasks, in their order, if they are fixed; equal by default.
            temperature: above 0; shares are more even above 1 and more uneven below.
            least: each task's share is at least this much, as a part of an equal one, in [0, 1].
            family: of the knobs.

        Raises:
            ValueError: a setting is out of range, or both `by` and `shares` are given.
        """
        if isinstance(tasks, str) or len(set(tasks)) < max(len(tasks), 1):
            raise ValueError(f"TaskMixture: tasks is {tasks!r}; expected at least one name, each once")
        if shares is not None and (by is not None or len(shares) != len(tasks) or min(shares) < 0 or sum(shares) <= 0):
            raise ValueError(
                f"TaskMixture: shares is {list(shares)} for {len(tasks)} tasks, by is {by!r}; expected one for each "
                "task, none below 0 and one above, and no `by` beside them"
            )
        if temperature <= 0 or not 0 <= least <= 1 or family not in get_args(Family):
            raise ValueError(
                f"TaskMixture: temperature={temperature}, least={least}, family='{family}'; expected above 0, in "
                f"[0, 1], and one of {', '.join(get_args(Family))}"
            )
        self.tasks, self.shares, self.temperature, self.least = tuple(tasks), shares, temperature, least
        self.metric = by if by is None or "{task}" in by else f"reward/{{task}}/{by}"
        self.family = family
        self._seen: dict[str, float] = {}

    @property
    def moves(self) -> tuple[str, ...]:
        """A knob for each task."""
        return tuple(f"{self.family}/{task}" for task in self.tasks)

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """The shares.

        Raises:
            ValueError: a metric is not in [0, 1].
        """
        if self.metric is None:
            return self._spread(self.shares or [1.0] * len(self.tasks))
        for task in self.tasks:
            name = self.metric.format(task=task)
            if (value := situation.metrics.get(name)) is not None:
                if not 0 <= value <= 1:
                    told = f"metric '{name}' is {value} at step {situation.step}"
                    raise ValueError(f"TaskMixture: {told}; expected a number from 0 to 1")
                self._seen[task] = float(value)
        if len(self._seen) < len(self.tasks):
            return {}
        return self._spread([(1 - self._seen[task]) ** (1 / self.temperature) for task in self.tasks])

    def _spread(self, weights: Sequence[float]) -> dict[str, float]:
        """Weights as shares; equal ones if all weights are 0."""
        total, equal = sum(weights), 1 / len(weights)
        shares = [weight / total if total else equal for weight in weights]
        return {
            knob: (1 - self.least) * share + self.least * equal for knob, share in zip(self.moves, shares, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        """The last metrics."""
        return {"seen": dict(self._seen)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore them."""
        self._seen = dict(state["seen"])
