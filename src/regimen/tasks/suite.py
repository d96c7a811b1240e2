"""Several tasks evaluated as one, each counting as much as the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation, Task


class Suite:
    """Tasks side by side: equal numbers of samples of each, and an evaluation with means over the tasks.

    In a stage, list the tasks themselves where their shares are to be moved; a suite fixes them.

    Attributes:
        collects: names of the tasks that its samples are of.
    """

    def __init__(self, name: str, tasks: Sequence[Task]) -> None:
        """Make it.

        Raises:
            ValueError: no tasks, or groups of different sizes.
        """
        sizes = {task.name: task.group_size for task in tasks}
        if len(set(sizes.values())) != 1:
            raise ValueError(
                f"suite '{name}' has the tasks {sizes or 'none'}, named with their group sizes; expected at least one, "
                "and equal sizes, so that each can give as many samples"
            )
        self.name, self.tasks, self.generates = name, list(tasks), any(task.generates for task in tasks)
        self.group_size = len(tasks) * tasks[0].group_size
        self.collects = tuple(sizes)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the tasks."""
        return tuple({knob.name: knob for task in self.tasks for knob in task.knobs}.values())

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, equal numbers of every task."""
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"suite '{self.name}' was asked for {size} samples; expected a multiple of {self.group_size}, a group "
                f"of each of its {len(self.tasks)} tasks"
            )
        return Rollout.cat([task.collect(cast, knobs, rng, size // len(self.tasks)) for task in self.tasks])

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Every task's metrics as `<task>/<metric>`, and of metrics that all have, the mean over tasks."""
        found = {task.name: task.evaluate(cast, knobs, rng) for task in self.tasks}
        each = [evaluation.metrics for evaluation in found.values()]
        shared = [name for name in each[0] if all(name in metrics for metrics in each)]
        means = {name: sum(metrics[name] for metrics in each) / len(each) for name in shared}
        apart = {f"{task}/{name}": value for task, e in found.items() for name, value in e.metrics.items()}
        samples = {f"{task}/{name}": value for task, e in found.items() for name, value in e.samples.items()}
        return Evaluation({**means, **apart}, samples)

    def state_dict(self) -> dict[str, Any]:
        """Where every task stands."""
        return {"tasks": [task.state_dict() for task in self.tasks]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        for task, saved in zip(self.tasks, state["tasks"], strict=True):
            task.load_state_dict(saved)
