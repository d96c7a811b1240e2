"""Samples of a policy beside those of another for the same contexts, and what annotators say of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from regimen.functions.verdicts import learned_once
from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.prompts import PromptTask

Annotate = Callable[[Rollout, torch.Generator], Mapping[str, Tensor]]
"""A rollout and a random stream to columns: what annotators say."""
Measure = Callable[[Mapping[str, Any], Mapping[str, float], torch.Generator], Evaluation]


class SideBySide:
    """Prompts that two members answer, each from its own noise: the policy, and a frozen one.

    A sample is the policy's. Beside it stand the columns `reference_image`, what the frozen member made of the same
    context, and `prediction`, what the policy's sample is as a differentiable function of its weights (without the
    gradient), for annotators and logs. The sample is learned from at one step, drawn from the last part of its steps:
    predictions from early ones are blurs.
    """

    generates = True

    def __init__(
        self,
        task: PromptTask,
        *,
        reference: str = "reference",
        last: float = 0.5,
        annotate: Annotate | None = None,
        evaluate: Measure | None = None,
    ) -> None:
        """Put another member beside a task's.

        Args:
            task: what the policy is asked.
            reference: the member beside it.
            last: see `learned_once`.
            annotate: what annotators say, in further columns; such as `labelled_pairs` of the three images.
            evaluate: measures the cast; by default the task does.
        """
        self.task, self.reference, self.last = task, reference, last
        self.annotate, self.measure = annotate, evaluate
        self.name, self.group_size = task.name, task.group_size

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the task."""
        return self.task.knobs

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` samples, each beside another."""
        rollout = self.task.collect(cast, knobs, rng, size)
        rollout = rollout.replace(loss_mask=learned_once(rollout.mask, self.last, rng))
        beside = cast[self.reference].sample(rollout.context, knobs, rng)["image"]
        with torch.no_grad():
            prediction = cast[self.task.member].reparameterised(rollout, rng)["image"]
        rollout = rollout.with_columns(reference_image=beside, prediction=prediction)
        return rollout if self.annotate is None else rollout.with_columns(**self.annotate(rollout, rng))

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """What its measure finds, or the task."""
        return (self.measure or self.task.evaluate)(cast, knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """That of the task."""
        return self.task.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.task.load_state_dict(state)
