"""Objectives on what the policy would do now: states from memory, actions drawn anew and judged by a critic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from regimen.knobs import Knob
from regimen.objectives.base import Batch, Loss, Objective
from regimen.rollout import Rollout


class Resampled(Objective):
    """An objective on the minibatch's samples with actions that a member takes now, in the place of the recorded ones.

    With `ReinforceObjective` and a credit that asks a critic of actions (`CriticAdvantage`) it is an on-policy gradient
    in states that other policies have reached: no importance weights are needed, and no environment step is taken. The
    new actions are drawn once per minibatch for all objectives that ask for them, and counted (`drawn`).
    """

    def __init__(
        self,
        objective: Objective,
        credit: Callable[[Rollout, Mapping[str, float], Mapping[str, Any]], Rollout] | None = None,
        member: str = "policy",
    ) -> None:
        """Put an objective on actions drawn anew.

        Args:
            objective: a mean over samples or steps, such as `ReinforceObjective`.
            credit: any `Credit`: gives the samples advantages, and may lay them out anew; it sees a slice of the
                minibatch at a time.
            member: who acts; it has a method `resample`.
        """
        self.objective, self.credit, self.member, self.name = objective, credit, member, objective.name

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the objective and the credit read."""
        return (*self.objective.knobs, *(getattr(self.credit, "knobs", ())))

    def leaves(self) -> Iterator[Objective]:
        """Those of the objective."""
        yield from self.objective.leaves()

    def parts(self) -> Iterator[Objective]:
        """Itself, then the parts of the objective on the same actions."""
        yield self
        for part in list(self.objective.parts())[1:]:
            yield Resampled(part, self.credit, self.member)

    def loss(self, batch: Batch) -> Any:
        """The objective's."""
        return self(batch).total

    def __call__(self, batch: Batch) -> Loss:
        """The objective on the slice's samples with new actions, times the slice's share of the minibatch."""
        fresh = batch.resampled(self.member)
        if self.credit is not None:
            fresh = self.credit(fresh, batch.knobs, batch.cast)
        found = self.objective(Batch(fresh, batch.cast, batch.knobs, batch.rng, spent=batch.spent))
        components = {name: batch.share * value for name, value in found.components.items()}
        return Loss(batch.share * found.total, components, found.metrics)
