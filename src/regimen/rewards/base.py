"""What a reward is: it scores a rollout, and it composes with others by plain arithmetic.

A component may *score* a sample, say that it is *not applicable*, or *fail*. The three are different values,
counted and shown; none of them is silently a 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor

from regimen.knobs import Knob, Weight
from regimen.rewards.limits import time_limit
from regimen.rollout import Rollout

SCORED, NOT_APPLICABLE, FAILED = 0, 1, 2


@dataclass(frozen=True)
class Score:
    """Values of one component.

    Attributes:
        value: `[B]` or `[B, T]`; what stands where `status` is not `SCORED` has no meaning.
        status: uint8 `[B]`: `SCORED`, `NOT_APPLICABLE` or `FAILED`.
        errors: why samples failed, one line each (at most a few).
    """

    value: Tensor
    status: Tensor
    errors: tuple[str, ...] = ()

    @classmethod
    def of(cls, value: Tensor, applicable: Tensor | None = None) -> Score:
        """A score that is not applicable where `applicable` (bool `[B]`) is False."""
        status = torch.zeros(value.shape[0], dtype=torch.uint8, device=value.device)
        if applicable is not None:
            status = torch.where(applicable, status, NOT_APPLICABLE)
        return cls(value, status)

    @classmethod
    def failed(cls, batch: int, why: str, device: Any = None) -> Score:
        """A score of which every sample failed for one reason."""
        status = torch.full((batch,), FAILED, dtype=torch.uint8, device=device)
        return cls(torch.zeros(batch, device=device), status, (why,))


@dataclass(frozen=True)
class Judgement:
    """A reward's answer: every component as it was scored, and the total that trains (`None` if all only log)."""

    components: dict[str, Score]
    total: Score | None


@dataclass(frozen=True)
class Scene:
    """What a reward may look at besides the rollout.

    Attributes:
        cast: the regimen's named modules.
        knobs: the values in force now (those at sampling time are in the rollout).
        timeout_s: time limit for one component; `None` for none.
    """

    cast: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, float] = field(default_factory=dict)
    timeout_s: float | None = None


class Expression(ABC):
    """A reward or a composition of rewards; `+`, `-`, `*`, `when` and `logged` compose."""

    @abstractmethod
    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score a rollout."""

    @abstractmethod
    def leaves(self) -> Iterator[Reward]:
        """The components, in order."""

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs read here and below."""
        return tuple(knob for leaf in self.leaves() for knob in leaf.reads)

    @property
    def term_name(self) -> str:
        """A name for weights and errors."""
        return "+".join(leaf.name for leaf in self.leaves())

    def __add__(self, other: Expression) -> SumReward:
        return SumReward([*_terms(self), *_terms(other)])

    def __sub__(self, other: Expression) -> SumReward:
        return self + other.__neg__()

    def __neg__(self) -> SumReward:
        return SumReward([(weight.times(-1), term) for weight, term in _terms(self)])

    def __mul__(self, other: float | Knob | Expression) -> Expression:
        if isinstance(other, Expression):
            return ProductReward(self, other)
        if isinstance(other, Knob) or not isinstance(self, SumReward):
            return SumReward([(Weight.of(other, self.term_name), self)])
        return SumReward([(weight.times(other), term) for weight, term in self.terms])

    __rmul__ = __mul__

    def when(self, gate: Expression, above: float = 0.0) -> GatedReward:
        """This reward where `gate` scores above a threshold, 0 elsewhere."""
        return GatedReward(self, gate, above)

    def on(self, *tasks: str) -> TaskReward:
        """This reward for samples of some tasks only; not applicable, and not computed, for all others."""
        return TaskReward(self, tasks)

    def logged(self) -> LoggedReward:
        """This reward, only logged: it never trains."""
        return LoggedReward(self)

    def state_dict(self) -> dict[str, Any]:
        """State of every component that has any."""
        return {leaf.name: state for leaf in self.leaves() if (state := leaf.save_state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for leaf in self.leaves():
            if leaf.name in state:
                leaf.load_state(state[leaf.name])


class Reward(Expression):
    """One named component. Subclass it and write `score`; or wrap a function with `reward_from`.

    Attributes:
        name: of the component, in logs and in the knob `weight/<name>`.
        reads: the knobs that it reads.
        stateful: it remembers rollouts, so it is never asked twice about one.
        version: raise it when the same settings come to mean other values.
    """

    name: str = "reward"
    reads: tuple[Knob, ...] = ()
    stateful: bool = False
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

    @final
    def leaves(self) -> Iterator[Reward]:
        """Itself."""
        yield self

    @final
    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """The score with exceptions, wrong shapes, time-outs and NaN turned into *failed*, by sample."""
        score = self._attempt(rollout, scene)
        return Judgement({self.name: score}, score)

    def _attempt(self, rollout: Rollout, scene: Scene) -> Score:
        try:
            with time_limit(scene.timeout_s, f"reward '{self.name}'"):
                return self._checked(self.score(rollout, scene), rollout)
        except TimeoutError as error:
            return Score.failed(len(rollout), str(error), rollout.mask.device)
        except Exception as error:
            # A batch fails as a whole only if its single samples cannot be told apart.
            whole = len(rollout) == 1 or self.stateful or bool((rollout.group == rollout.group[0]).all())
            if whole:
                why = f"reward '{self.name}' raised {type(error).__name__}: {error}"
                return Score.failed(len(rollout), why, rollout.mask.device)
            return self._by_group(rollout, scene)

    def _by_group(self, rollout: Rollout, scene: Scene) -> Score:
        """Each group on its own, so that only the guilty ones fail."""
        rows = [(rollout.group == g).nonzero().flatten() for g in rollout.group.unique()]
        scores = [self._attempt(rollout[index], scene) for index in rows]
        wide = any(score.value.ndim > 1 for score in scores)
        values = [
            s.value if s.value.ndim > 1 or not wide else s.value[:, None].expand(-1, rollout.steps) for s in scores
        ]
        order = torch.cat(rows).argsort()
        errors = tuple(error for score in scores for error in score.errors)
        return Score(torch.cat(values)[order], torch.cat([s.status for s in scores])[order], errors)

    def _checked(self, result: Tensor | Score, rollout: Rollout) -> Score:
        score = result if isinstance(result, Score) else Score.of(torch.as_tensor(result))
        batch, steps = len(rollout), rollout.steps
        if tuple(score.value.shape) not in ((batch,), (batch, steps)):
            raise ValueError(
                f"returned shape {list(score.value.shape)}, expected [{batch}] (one per sample) or "
                f"[{batch}, {steps}] (one per step)"
            )
        value = score.value.to(rollout.mask.device, torch.get_default_dtype())
        status = score.status.to(rollout.mask.device)
        bad = ~(value if value.ndim == 1 else torch.where(rollout.mask, value, 0).sum(1)).isfinite()
        bad &= status == SCORED
        if not bool(bad.any()):
            return Score(value, status, score.errors)
        first = int(bad.nonzero()[0])
        shown = float(value[first]) if value.ndim == 1 else math.nan
        why = f"reward '{self.name}' returned {shown} for sample {first} (task {_task_of(rollout, first)})"
        return Score(value, torch.where(bad, FAILED, status), (*score.errors, why))


class SumReward(Expression):
    """A weighted sum. A sample fails if any term failed, and is not applicable where no term applies."""

    def __init__(self, terms: list[tuple[Weight, Expression]]) -> None:
        names = [leaf.name for _, term in terms for leaf in term.leaves()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two components of one reward are called {', '.join(twice)}; give one another name")
        self.terms = terms

    def leaves(self) -> Iterator[Reward]:
        """The components of all terms."""
        for _, term in self.terms:
            yield from term.leaves()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weights, and what the terms read."""
        weights = tuple(weight.knob for weight, term in self.terms if not isinstance(term, LoggedReward))
        return weights + tuple(knob for _, term in self.terms for knob in term.knobs)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score every term, then add."""
        parts = [(weight, term.judge(rollout, scene)) for weight, term in self.terms]
        components = {name: score for _, part in parts for name, score in part.components.items()}
        training = [(weight.value(scene.knobs), part.total) for weight, part in parts if part.total is not None]
        if not training:
            return Judgement(components, None)
        status = torch.stack([score.status for _, score in training])
        value: Tensor | float = 0.0
        for factor, score in training:
            value = _added(value, factor * _zeroed(score), rollout)
        total = torch.where((status == FAILED).any(0), FAILED, status.amin(0))
        assert isinstance(value, Tensor)
        return Judgement(components, Score(value, total.to(torch.uint8)))


class ProductReward(Expression):
    """The product of two rewards; it applies where both do."""

    def __init__(self, left: Expression, right: Expression) -> None:
        self.left, self.right = left, right

    def leaves(self) -> Iterator[Reward]:
        """The components of both factors."""
        yield from self.left.leaves()
        yield from self.right.leaves()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the factors read."""
        return self.left.knobs + self.right.knobs

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score both factors, then multiply (step by step if either is per step)."""
        left, right = self.left.judge(rollout, scene), self.right.judge(rollout, scene)
        components = {**left.components, **right.components}
        a, b = _training(left, "a product"), _training(right, "a product")
        value = _like(a.value, b.value) * _like(b.value, a.value)
        return Judgement(components, Score(value, torch.maximum(a.status, b.status)))


class GatedReward(Expression):
    """A reward where another one scores above a threshold, 0 elsewhere; the gate's components are logged."""

    def __init__(self, reward: Expression, gate: Expression, above: float) -> None:
        self.reward, self.gate, self.above = reward, gate, above

    def leaves(self) -> Iterator[Reward]:
        """The components of the reward and of the gate."""
        yield from self.reward.leaves()
        yield from (leaf for leaf in self.gate.leaves() if leaf not in tuple(self.reward.leaves()))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What both read."""
        return self.reward.knobs + self.gate.knobs

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score both, then close the gate where it does not pass."""
        reward, gate = self.reward.judge(rollout, scene), self.gate.judge(rollout, scene)
        value, door = _training(reward, "a gate"), _training(gate, "a gate")
        passed = _like(door.value > self.above, value.value)
        value_open = torch.where(passed, _like(value.value, door.value), 0)
        total = Score(value_open, torch.maximum(value.status, door.status))
        return Judgement({**gate.components, **reward.components}, total)


class FirstApplicable(Expression):
    """Per sample, the first reward that is neither not applicable nor failed."""

    def __init__(self, *options: Expression) -> None:
        if not options:
            raise ValueError("FirstApplicable needs at least one reward")
        self.options = options

    def leaves(self) -> Iterator[Reward]:
        """The components of all options."""
        for option in self.options:
            yield from option.leaves()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the options read."""
        return tuple(knob for option in self.options for knob in option.knobs)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score all options, then choose by sample."""
        judged = [option.judge(rollout, scene) for option in self.options]
        components = {name: score for part in judged for name, score in part.components.items()}
        chosen = _training(judged[0], "FirstApplicable")
        for part in judged[1:]:
            other = _training(part, "FirstApplicable")
            take = (chosen.status != SCORED) & ((other.status == SCORED) | (chosen.status == NOT_APPLICABLE))
            value = torch.where(
                _like(take, _like(other.value, chosen.value)),
                _like(other.value, chosen.value),
                _like(chosen.value, other.value),
            )
            chosen = Score(value, torch.where(take, other.status, chosen.status))
        return Judgement(components, chosen)


class LoggedReward(Expression):
    """A reward that is scored and logged, and never trains."""

    def __init__(self, reward: Expression) -> None:
        self.reward = reward

    def leaves(self) -> Iterator[Reward]:
        """The components of the reward."""
        yield from self.reward.leaves()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the reward reads."""
        return self.reward.knobs

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score, without a total."""
        return Judgement(self.reward.judge(rollout, scene).components, None)


class TaskReward(Expression):
    """A reward that applies to the samples of some tasks; the others are not shown to it."""

    def __init__(self, reward: Expression, tasks: tuple[str, ...]) -> None:
        if not tasks:
            raise ValueError("Reward.on: name at least one task")
        self.reward, self.tasks = reward, tasks

    def leaves(self) -> Iterator[Reward]:
        """The components of the reward."""
        yield from self.reward.leaves()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the reward reads."""
        return self.reward.knobs

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score the samples of those tasks, and spread the scores over the whole rollout."""
        wanted = [index for index, name in enumerate(rollout.task_names) if name in self.tasks]
        rows = torch.isin(rollout.task, torch.tensor(wanted, dtype=torch.int64, device=rollout.task.device))
        if bool(rows.all()):
            return self.reward.judge(rollout, scene)
        if not bool(rows.any()):
            nothing = _spread(Score.of(torch.zeros(0, device=rows.device)), rows)
            return Judgement({leaf.name: nothing for leaf in self.leaves()}, nothing)
        judged = self.reward.judge(rollout[rows], scene)
        components = {name: _spread(score, rows) for name, score in judged.components.items()}
        return Judgement(components, None if judged.total is None else _spread(judged.total, rows))


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


def at_last_step(value: Tensor, mask: Tensor) -> Tensor:
    """A value per sample `[B]` placed on the last existing step: `[B, T]`; `[B, T]` is returned as it is."""
    if value.ndim == 2:
        return value
    last = mask.flip(1).float().argmax(1)
    spread = torch.zeros(mask.shape, dtype=value.dtype, device=value.device)
    return spread.scatter(1, (mask.shape[1] - 1 - last)[:, None], value[:, None])


def _terms(expression: Expression) -> list[tuple[Weight, Expression]]:
    if isinstance(expression, SumReward):
        return list(expression.terms)
    return [(Weight.of(1.0, expression.term_name), expression)]


def _zeroed(score: Score) -> Tensor:
    scored = score.status == SCORED
    return torch.where(scored if score.value.ndim == 1 else scored[:, None], score.value, 0)


def _added(total: Tensor | float, term: Tensor, rollout: Rollout) -> Tensor:
    if isinstance(total, Tensor) and total.ndim != term.ndim:
        total, term = at_last_step(total, rollout.mask), at_last_step(term, rollout.mask)
    return total + term


def _spread(score: Score, rows: Tensor) -> Score:
    value = score.value.new_zeros(len(rows), *score.value.shape[1:])
    status = torch.full((len(rows),), NOT_APPLICABLE, dtype=torch.uint8, device=rows.device)
    value[rows], status[rows] = score.value, score.status
    return Score(value, status, score.errors)


def _like(value: Tensor, other: Tensor) -> Tensor:
    """`[B]` as `[B, 1]` if the other is per step."""
    return value[:, None] if value.ndim < other.ndim else value


def _training(judgement: Judgement, where: str) -> Score:
    if judgement.total is None:
        raise ValueError(f"{where} was given a reward that is only logged ({', '.join(judgement.components)})")
    return judgement.total


def _task_of(rollout: Rollout, row: int) -> str:
    return rollout.task_names[int(rollout.task[row])]
