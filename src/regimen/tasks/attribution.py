"""How true the contributions are that an estimator gives to steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from regimen.functions.attribution import misfit
from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.env import EnvTask


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's coefficient of two tensors of one shape, `[]`; 0 if one of them is constant."""
    x, y = (values.double().flatten() - values.double().mean() for values in (x, y))
    scale = x.norm() * y.norm()
    return torch.where(scale > 0, (x @ y) / scale, 0.0)


class AttributionTest:
    """Evaluates an estimator on fresh episodes of the policy as it is, of an environment that tells the truth.

    `misfit` says how far off the sums are (see `functions.attribution.misfit`), `correlation` how close the
    contributions of single steps are to what they earned: many contributions have the right sum. Nothing of it is for
    training.
    """

    generates = True

    def __init__(self, name: str, task: EnvTask, *, member: str = "estimator", credit: str = "credit") -> None:
        """Make the test.

        Args:
            name: of the metrics; the test itself is never collected from.
            task: plays `copies` whole episodes; of its own, so that training's is left where it stands.
            member: the estimator; nothing is said while its `misfit` is inf.
            credit: step column `[B, T]` with the truth.
        """
        self.name, self.task, self.member, self.credit = name, task, member, credit
        self.group_size, self.collects = task.group_size, (task.name,)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the task."""
        return self.task.knobs

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """The task's."""
        return self.task.collect(cast, knobs, rng, size)

    @torch.no_grad()
    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """Both numbers."""
        estimator = cast.get(self.member)
        if estimator is None or not bool(torch.as_tensor(estimator.misfit).isfinite()):
            return Evaluation({})
        rollout = self.task.collect(cast, knobs, rng, self.task.copies)
        said, final = estimator(rollout), torch.where(rollout.mask, rollout["env_reward"], 0).sum(1)
        found = {
            "misfit": misfit(said.sum(1), final),
            "correlation": correlation(said[rollout.mask], rollout[self.credit][rollout.mask]),
        }
        return Evaluation({name: float(value) for name, value in found.items() if value.isfinite()})

    def state_dict(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Nothing to restore."""
