"""What a reward answers, and how rewards compose by plain arithmetic.

A component may *score* a sample, say that it is *not applicable*, or *fail*. The three are different values,
counted and shown; none of them is silently a 0.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

import torch
from torch import Tensor

from regimen.knobs import Knob, Weight
from regimen.rollout import Rollout

if TYPE_CHECKING:
    from regimen.rewards.base import Reward

SCORED, NOT_APPLICABLE, FAILED = 0, 1, 2
Answer = TypeVar("Answer")


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
        status = torch.zeros(value.shape[:1], dtype=torch.uint8, device=value.device)
        if applicable is not None:
            status = torch.where(applicable, status, NOT_APPLICABLE)
        return cls(value, status)

    @classmethod
    def failed(cls, batch: int, why: str, device: Any = None) -> Score:
        """A score of which every sample failed for one reason."""
        status = torch.full((batch,), FAILED, dtype=torch.uint8, device=device)
        return cls(torch.zeros(batch, device=device), status, (why,))

    @property
    def scored(self) -> Tensor:
        """Bool, where the value counts: `[B]`, or `[B, 1]` if there is a value per step."""
        scored = self.status == SCORED
        return scored if self.value.ndim == 1 else scored[:, None]


@dataclass(frozen=True)
class Judgement:
    """A reward's answer: every component as it was scored, and the total that trains (`None` if all only log)."""

    components: dict[str, Score]
    total: Score | None


@dataclass(frozen=True)
class Scene:
    """What a reward may look at besides the rollout. Each judging has its own.

    Attributes:
        cast: the regimen's named modules.
        knobs: the values in force now (those at sampling time are in the rollout).
        timeout_s: time limit for one component; `None` for none.
    """

    cast: Mapping[str, Any] = field(default_factory=dict)
    knobs: Mapping[str, float] = field(default_factory=dict)
    timeout_s: float | None = None
    _answers: dict[Any, tuple[Rollout, Any]] = field(default_factory=dict, repr=False, compare=False)

    def once(self, rollout: Rollout, question: Any, answer: Callable[[], Answer]) -> Answer:
        """The answer to a question about a rollout, computed the first time only.

        A component that stands twice in an expression (as a term and as a gate) is asked once.
        """
        key = (id(rollout), question)
        if key not in self._answers:
            # The rollout is kept so that no other one comes to have its id.
            self._answers[key] = (rollout, answer())
        found: Answer = self._answers[key][1]
        return found


class Remembering(Protocol):
    """A part of a reward that may have a state."""

    @property
    def name(self) -> str:
        """Unique within the reward."""
        ...

    def save_state(self) -> dict[str, Any]:
        """State for a checkpoint; empty for most."""
        ...

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `save_state` gave."""
        ...


class Expression(ABC):
    """A reward or a composition of rewards; `+`, `-`, `*`, `when`, `on` and `logged` compose."""

    @abstractmethod
    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score a rollout."""

    @abstractmethod
    def leaves(self) -> Iterator[Reward]:
        """The components, in order, each once."""

    def remembering(self) -> Iterator[Remembering]:
        """The parts that may have a state, each once: the components, and what is made of them and remembers."""
        yield from self.leaves()

    @property
    @abstractmethod
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs read here and below."""

    @property
    def trains(self) -> bool:
        """Whether it has a total that trains; False if it is only logged."""
        return True

    @property
    def undifferentiable(self) -> list[str]:
        """The components of its total that no gradient may flow through, by name; see `Reward.differentiable`."""
        return []

    def answer(self, rollout: Rollout, cast: Mapping[str, Any], knobs: Mapping[str, float]) -> Judgement:
        """Score a rollout with its graph kept, for objectives that train through a judge."""
        return self.judge(rollout, Scene(cast, knobs))

    @property
    def term_name(self) -> str:
        """A name for weights and errors."""
        return "+".join(leaf.name for leaf in self.leaves())

    def __add__(self, other: Expression) -> SumReward:
        if not isinstance(other, Expression):
            return NotImplemented
        return SumReward([*_terms(self), *_terms(other)])

    def __sub__(self, other: Expression) -> SumReward:
        if not isinstance(other, Expression):
            return NotImplemented
        return self + -other

    def __neg__(self) -> SumReward:
        return SumReward([(weight.times(-1), term) for weight, term in _terms(self)])

    def __mul__(self, other: float | Knob | Weight | Expression) -> Expression:
        if isinstance(other, Expression):
            return ProductReward(self, other)
        if not isinstance(other, float | int | Knob | Weight):
            return NotImplemented
        if isinstance(self, SumReward) and not isinstance(other, Knob | Weight):
            return SumReward([(weight.times(other), term) for weight, term in self.terms])
        return SumReward([(Weight.of(other, self.term_name), self)])

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
        """State of every part that has any."""
        return {part.name: state for part in self.remembering() if (state := part.save_state())}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        for part in self.remembering():
            if part.name in state:
                part.load_state(state[part.name])


class Composition(Expression):
    """A reward made of others. Different components have different names; one component may stand twice."""

    def __init__(self, *parts: Expression) -> None:
        self.parts = parts
        names = [part.name for part in self.remembering()]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two components of one reward are called {', '.join(twice)}; give one another name")

    def leaves(self) -> Iterator[Reward]:
        """The components of all parts."""
        seen: dict[int, Reward] = {id(leaf): leaf for part in self.parts for leaf in part.leaves()}
        yield from seen.values()

    def remembering(self) -> Iterator[Remembering]:
        """Those of all parts."""
        seen: dict[int, Remembering] = {id(kept): kept for part in self.parts for kept in part.remembering()}
        yield from seen.values()

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the parts read."""
        return tuple(knob for part in self.parts for knob in part.knobs)

    @property
    def undifferentiable(self) -> list[str]:
        """Those of the parts that train."""
        return list(dict.fromkeys(name for part in self.parts if part.trains for name in part.undifferentiable))

    def _must_train(self, *parts: Expression) -> None:
        for part in parts:
            if not part.trains:
                raise ValueError(
                    f"{type(self).__name__} was given '{part.term_name}', which is only logged and has no total; "
                    "drop its .logged()"
                )


class SumReward(Composition):
    """A weighted sum. A sample fails if any term failed, and is not applicable where no term applies.

    Beside a value per step, a value per sample counts at the last step.
    """

    def __init__(self, terms: list[tuple[Weight, Expression]]) -> None:
        self.terms = terms
        super().__init__(*(term for _, term in terms))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weights of what trains, and what the terms read."""
        return tuple(weight.knob for weight, term in self.terms if term.trains) + super().knobs

    @property
    def trains(self) -> bool:
        """Whether any term does."""
        return any(term.trains for _, term in self.terms)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score every term, then add."""
        parts = [(weight, term.judge(rollout, scene)) for weight, term in self.terms]
        components = {name: score for _, part in parts for name, score in part.components.items()}
        training = [(weight.value(scene.knobs), part.total) for weight, part in parts if part.total is not None]
        if not training:
            return Judgement(components, None)
        values = _aligned([torch.where(score.scored, score.value, 0) for _, score in training], rollout)
        total = sum((factor * value for (factor, _), value in zip(training, values, strict=True)), values[0] * 0)
        status = torch.stack([score.status for _, score in training])
        status = torch.where((status == FAILED).any(0), FAILED, status.amin(0))
        return Judgement(components, Score(total, status.to(torch.uint8)))


class ProductReward(Composition):
    """The product of two rewards; it applies where both do. A value per sample multiplies every step's."""

    def __init__(self, left: Expression, right: Expression) -> None:
        super().__init__(left, right)
        self._must_train(left, right)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score both factors, then multiply (step by step if either is per step)."""
        left, right = (part.judge(rollout, scene) for part in self.parts)
        a, b = _total(left), _total(right)
        value = _like(a.value, b.value) * _like(b.value, a.value)
        return Judgement(left.components | right.components, Score(value, torch.maximum(a.status, b.status)))


class GatedReward(Composition):
    """A reward where another one scores above a threshold, 0 elsewhere; the gate's components are logged.

    Behind a closed gate a failure of the reward does not count: an answer of the wrong format cannot be verified,
    and is worth 0. A sample for which either is not applicable, or whose gate failed, is so as a whole.
    """

    def __init__(self, reward: Expression, gate: Expression, above: float) -> None:
        super().__init__(reward, gate)
        self._must_train(reward, gate)
        self.above = above

    @property
    def undifferentiable(self) -> list[str]:
        """Those of the reward; the gate is open or closed."""
        return self.parts[0].undifferentiable

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score both, then close the gate where it does not pass."""
        reward, gate = (part.judge(rollout, scene) for part in self.parts)
        judged, door = _total(reward), _total(gate)
        passed = door.value > self.above
        closed = ~(passed if passed.ndim == 1 else (passed & rollout.mask).any(1)) & (door.status == SCORED)
        value = at_last_step(judged.value, rollout.mask) if passed.ndim == 2 else judged.value
        status = torch.where(closed & (judged.status == FAILED), SCORED, torch.maximum(judged.status, door.status))
        total = Score(torch.where(_like(passed, value), value, 0), status.to(torch.uint8))
        return Judgement(gate.components | reward.components, total)


class FirstApplicable(Composition):
    """Per sample, the first reward that is neither not applicable nor failed.

    If none scores a sample, it failed if any of them did, and is not applicable otherwise. Beside a value per
    step, a value per sample counts at the last step.
    """

    def __init__(self, *options: Expression) -> None:
        if not options:
            raise ValueError("FirstApplicable needs at least one reward")
        super().__init__(*options)
        self._must_train(*options)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score all options, then choose by sample."""
        judged = [option.judge(rollout, scene) for option in self.parts]
        components = {name: score for part in judged for name, score in part.components.items()}
        scores = [_total(part) for part in judged]
        values = torch.stack(_aligned([score.value for score in scores], rollout))
        status = torch.stack([score.status for score in scores])
        first = (status == SCORED).int().argmax(0)
        rows = torch.arange(len(first), device=first.device)
        none = torch.where((status == FAILED).any(0), FAILED, NOT_APPLICABLE)
        outcome = torch.where((status == SCORED).any(0), SCORED, none).to(torch.uint8)
        return Judgement(components, Score(values[first, rows], outcome))


class MeanReward(Composition):
    """Per sample, the mean of the rewards that apply to it. A sample fails if any failed.

    A sample of one criterion then weighs as much as one of four. Beside a value per step, a value per sample counts at
    the last step.
    """

    def __init__(self, *options: Expression) -> None:
        if not options:
            raise ValueError("MeanReward needs at least one reward")
        super().__init__(*options)
        self._must_train(*options)

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score all, then average."""
        judged = [option.judge(rollout, scene) for option in self.parts]
        components = {name: score for part in judged for name, score in part.components.items()}
        scores = [_total(part) for part in judged]
        values = _aligned([torch.where(score.scored, score.value, 0) for score in scores], rollout)
        status = torch.stack([score.status for score in scores])
        count = (status == SCORED).sum(0).clamp(min=1)
        total = torch.stack(values).sum(0)
        outcome = torch.where((status == FAILED).any(0), FAILED, status.amin(0)).to(torch.uint8)
        return Judgement(components, Score(total / (count if total.ndim == 1 else count[:, None]), outcome))


class LoggedReward(Composition):
    """A reward that is scored and logged, and never trains."""

    @property
    def trains(self) -> bool:
        """It does not."""
        return False

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score, without a total."""
        return Judgement(self.parts[0].judge(rollout, scene).components, None)


class TaskReward(Composition):
    """A reward that applies to the samples of some tasks; the others are not shown to it."""

    def __init__(self, reward: Expression, tasks: tuple[str, ...]) -> None:
        if not tasks:
            raise ValueError("Reward.on: name at least one task")
        self.tasks = tasks
        super().__init__(reward)

    @property
    def trains(self) -> bool:
        """Whether the reward does."""
        return self.parts[0].trains

    def judge(self, rollout: Rollout, scene: Scene) -> Judgement:
        """Score the samples of those tasks, and spread the scores over the whole rollout."""
        wanted = [index for index, name in enumerate(rollout.task_names) if name in self.tasks]
        rows = torch.isin(rollout.task, torch.tensor(wanted, dtype=torch.int64, device=rollout.task.device))
        if bool(rows.all()):
            return self.parts[0].judge(rollout, scene)
        if not bool(rows.any()):
            nothing = _spread(Score.of(torch.zeros(0, device=rows.device)), rows)
            return Judgement({leaf.name: nothing for leaf in self.leaves()}, nothing if self.trains else None)
        shown = scene.once(rollout, ("tasks", *wanted), lambda: rollout[rows])
        judged = self.parts[0].judge(shown, scene)
        components = {name: _spread(score, rows) for name, score in judged.components.items()}
        return Judgement(components, None if judged.total is None else _spread(judged.total, rows))


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


def _aligned(values: list[Tensor], rollout: Rollout) -> list[Tensor]:
    """All per sample, or all per step."""
    if all(value.ndim == 1 for value in values):
        return values
    return [at_last_step(value, rollout.mask) for value in values]


def _spread(score: Score, rows: Tensor) -> Score:
    value = score.value.new_zeros(len(rows), *score.value.shape[1:])
    status = torch.full((len(rows),), NOT_APPLICABLE, dtype=torch.uint8, device=rows.device)
    value[rows], status[rows] = score.value, score.status
    return Score(value, status, score.errors)


def _like(value: Tensor, other: Tensor) -> Tensor:
    """`[B]` as `[B, 1]` if the other is per step."""
    return value[:, None] if value.ndim < other.ndim else value


def _total(judgement: Judgement) -> Score:
    assert judgement.total is not None, "compositions that need a total refuse rewards without one"
    return judgement.total
