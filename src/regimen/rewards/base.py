"""What a reward is: one named component that scores a rollout, and whose failures are contained."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rewards.expression import (
    FAILED,
    NOT_APPLICABLE,
    SCORED,
    Expression,
    FirstApplicable,
    Judgement,
    MeanReward,
    Scene,
    Score,
    at_last_step,
)
from regimen.rewards.limits import LimitReached, time_limit
from regimen.rollout import Rollout

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "SCORED",
    "Expression",
    "FirstApplicable",
    "FunctionReward",
    "Judgement",
    "MeanReward",
    "Reward",
    "Scene",
    "Score",
    "at_last_step",
    "reward_from",
]


class Reward(Expression):
    """One named component. Subclass it and write `score`; or wrap a function with `reward_from`.

    Attributes:
        name: of the component, in logs and in the knob `weight/<name>`.
        reads: the knobs that it reads.
        stateful: it remembers rollouts, so it is never asked twice about one.
        differentiable: a gradient may flow through its score into what it looks at.
        version: raise it when the same settings come to mean other values.
    """

    name: str = "reward"
    reads: tuple[Knob, ...] = ()
    stateful: bool = False
    differentiable: bool = False
    version: int = 1

    @abstractmethod
    def score(self, rollout: Rollout, scene: Scene) -> Tensor | Score:
        """Values `[B]` or `[B, T]`; NaN in a row means that the sample failed.

        Return a `Score` to say where the component is not applicable. The whole group is visible.
        """

    def save_state(self) -> dict[str, Any]:
        """State for a checkpoint; empty for most."""
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `save_state` gave."""

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that it reads."""
        return self.reads

    @property
    def undifferentiable(self) -> list[str]:
        """Its own name, unless it is differentiable and without a state."""
        return [] if self.differentiable and not self.stateful else [self.name]

    @final
    def leaves(self) -> Iterator[Reward]:
        """Itself."""
        yield self

    @final
    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """The score with exceptions, wrong shapes, time-outs and NaN turned into *failed*, by sample."""
        score = scene.once(rollout, id(self), lambda: self._attempt(rollout, scene))
        return Judgement({self.name: score}, score)

    def _attempt(self, rollout: Rollout, scene: Scene) -> Score:
        try:
            with time_limit(scene.timeout_s, f"reward '{self.name}'"):
                result = self.score(rollout, scene)
        except LimitReached as error:
            return Score.failed(len(rollout), str(error), rollout.mask.device)
        except Exception as error:
            # A batch fails as a whole only if its groups cannot be told apart.
            if self.stateful or bool((rollout.group == rollout.group[:1]).all()):
                why = f"reward '{self.name}' raised {type(error).__name__}: {error}"
                return Score.failed(len(rollout), why, rollout.mask.device)
            return self._by_group(rollout, scene)
        return self._checked(result, rollout)

    def _by_group(self, rollout: Rollout, scene: Scene) -> Score:
        """Each group on its own, so that only the guilty ones fail."""
        rows = [(rollout.group == g).nonzero().flatten() for g in rollout.group.unique()]
        scores = [self._attempt(rollout[index], scene) for index in rows]
        values = [score.value for score in scores]
        if any(value.ndim > 1 for value in values):
            values = [at_last_step(v, rollout.mask[index]) for v, index in zip(values, rows, strict=True)]
        order = torch.cat(rows).argsort()
        errors = tuple(error for score in scores for error in score.errors)
        return Score(torch.cat(values)[order], torch.cat([s.status for s in scores])[order], errors)

    def _checked(self, result: Any, rollout: Rollout) -> Score:
        batch, device = len(rollout), rollout.mask.device
        try:
            score = result if isinstance(result, Score) else Score.of(torch.as_tensor(result))
        except (TypeError, ValueError, RuntimeError):
            return Score.failed(batch, f"reward '{self.name}' returned {result!r:.60}, expected a tensor", device)
        shape, expected = list(score.value.shape), [[batch], [batch, rollout.steps]]
        if shape not in expected or list(score.status.shape) != [batch]:
            status = "" if shape not in expected else f" with a status of {list(score.status.shape)}"
            why = f"returned shape {shape}{status}, expected {expected[0]} (one per sample) or {expected[1]} (per step)"
            return Score.failed(batch, f"reward '{self.name}' {why}", device)
        value = score.value.to(device, torch.get_default_dtype())
        if value.ndim == 2:
            value = torch.where(rollout.mask, value, 0)
        return self._without_nan(Score(value, score.status.to(device), score.errors), rollout)

    def _without_nan(self, score: Score, rollout: Rollout) -> Score:
        """A sample with a value that is not finite has failed."""
        value = score.value
        if all_finite(value):
            return score
        bad = ~(value if value.ndim == 1 else value.sum(1)).isfinite() & (score.status == SCORED)
        if not bool(bad.any()):
            return score
        first = int(bad.nonzero()[0])
        shown = float(value[first]) if value.ndim == 1 else math.nan
        task = rollout.task_names[int(rollout.task[first])]
        why = f"reward '{self.name}' returned {shown} for sample {first} (task {task})"
        return Score(value, torch.where(bad, FAILED, score.status).to(torch.uint8), (*score.errors, why))


def all_finite(value: Tensor) -> bool:
    """True only if every sample's sum is finite, `value [B]` or `[B, T]`; it may say False of large finite numbers."""
    value = value.detach()
    return math.isfinite(float((value if value.ndim == 1 else value.sum(1)).sum()))


class FunctionReward(Reward):
    """A plain function of the rollout as a component."""

    def __init__(self, function: Callable[[Rollout], Tensor | Score], name: str) -> None:
        self.function, self.name = function, name

    def score(self, rollout: Rollout, scene: Scene) -> Tensor | Score:
        """What the function returns."""
        return self.function(rollout)


def reward_from(function: Callable[[Rollout], Tensor | Score]) -> FunctionReward:
    """Decorator: a function `rollout -> [B] or [B, T]` becomes a component under its own name."""
    return FunctionReward(function, getattr(function, "__name__", "reward"))
