"""What an objective is: it turns a batch into a loss, and it composes with others by plain arithmetic."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from regimen.functions.aggregate import Aggregate, aggregate_weights
from regimen.knobs import Knob, Weight
from regimen.policies.base import StepDistribution
from regimen.rollout import Rollout, Steps


@dataclass
class Batch:
    """What an objective computes its loss from.

    It may be a slice of a larger minibatch whose gradients are accumulated: `whole` is that
    minibatch and `rows` says which of its rows are here, so that the losses of all slices sum to the
    loss of the whole.

    Attributes:
        rollout: `B` samples.
        cast: the regimen's named modules.
        knobs: the values in force.
        rng: for objectives that draw (noise levels, perturbations).
        spent: what was spent beside the samples, to be counted: `drawn`, actions drawn anew (see `resampled`).
    """

    rollout: Rollout
    cast: Mapping[str, Any]
    knobs: Mapping[str, float]
    rng: torch.Generator
    whole: Rollout | None = None
    rows: slice = field(default_factory=lambda: slice(None))
    spent: Counter[str] = field(default_factory=Counter)
    _weights: dict[tuple[Aggregate, int | None], Tensor] = field(default_factory=dict)
    _distributions: dict[str, StepDistribution] = field(default_factory=dict)
    _proposals: dict[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    _resampled: dict[str, Rollout] = field(default_factory=dict)
    _reparameterised: dict[str, Rollout] = field(default_factory=dict)
    _of_tasks: dict[tuple[str, ...], Batch] = field(default_factory=dict)
    _found: dict[str, Tensor] = field(default_factory=dict)

    def of_tasks(self, *tasks: str) -> Batch:
        """The samples of some tasks, as a slice of those of the minibatch; made once for all objectives."""
        if tasks not in self._of_tasks:
            whole = self.rollout if self.whole is None else self.whole
            wanted = [place for place, name in enumerate(whole.task_names) if name in tasks]
            theirs = torch.isin(whole.task, torch.tensor(wanted, dtype=torch.int64, device=whole.task.device))
            here = theirs[self.rows]
            first = int(theirs[: self.rows.start or 0].sum())
            rows = slice(first, first + int(here.sum()))
            part = Batch(self.rollout[here], self.cast, self.knobs, self.rng, whole[theirs], rows, self.spent)
            self._of_tasks[tasks] = self if bool(theirs.all()) else part
        return self._of_tasks[tasks]

    def weights(self, aggregate: Aggregate, horizon: int | None = None) -> Tensor:
        """`[B, T]`: the sum of a loss per step under these weights is its aggregate over the minibatch."""
        key = aggregate, horizon
        if key not in self._weights:
            whole = self.rollout if self.whole is None else self.whole
            segment = whole.segment if aggregate == "segment" else None
            self._weights[key] = aggregate_weights(whole.loss_mask, aggregate, horizon, segment)[self.rows]
        return self._weights[key]

    @cached_property
    def steps(self) -> Steps:
        """Those that are learned from."""
        return Steps(self.rollout.loss_mask)

    def aggregated(self, per_step: Tensor, aggregate: Aggregate, horizon: int | None = None) -> Tensor:
        """The sum `[]` of a loss `[R]` per step that is learned from, under its `weights`."""
        whole = self.whole is None or self.whole is self.rollout
        if aggregate == "token" and whole and self.steps.every and len(per_step):
            return per_step.mean(dtype=torch.promote_types(per_step.dtype, torch.get_default_dtype()))
        return (per_step * self.steps.of(self.weights(aggregate, horizon))).sum()

    @property
    def share(self) -> float:
        """This slice's share of the minibatch's samples, for losses that are means over samples."""
        return 1.0 if self.whole is None or self.whole is self.rollout else len(self.rollout) / len(self.whole)

    def distribution(self, member: str = "policy") -> StepDistribution:
        """A member's distribution at the steps that are learned from, computed once for all objectives.

        A frozen member is run without gradients.
        """
        if member not in self._distributions:
            policy = self.member(member)
            frozen = isinstance(policy, nn.Module) and not any(p.requires_grad for p in policy.parameters())
            with torch.set_grad_enabled(not frozen and torch.is_grad_enabled()):
                self._distributions[member] = policy.distribution(self.rollout, self.rollout.loss_mask)
        return self._distributions[member]

    def proposal(self, member: str = "policy") -> tuple[Tensor, Tensor | None]:
        """Actions `[R, ...]` that a member proposes at the steps that are learned from, and their log-probabilities.

        Drawn once for all objectives. Both have a gradient; the second is `None` of a deterministic policy.
        """
        if member not in self._proposals:
            observations = self.steps.of(self.rollout.observations)
            self._proposals[member] = self.member(member).propose(observations, self.rng)
        return self._proposals[member]

    def resampled(self, member: str = "policy") -> Rollout:
        """The samples with actions that a member takes now where theirs are learned from, and no environment answers.

        Drawn once for all objectives, without a gradient, under the knobs in force (`member.resample(rollout, knobs,
        rng)`).

        Raises:
            ValueError: the member cannot act anew.
        """
        if member not in self._resampled:
            policy = self.member(member)
            if not hasattr(policy, "resample"):
                raise ValueError(
                    f"member '{member}' ({type(policy).__name__}) draws no actions for samples that are there; use an "
                    "ActionPolicy, an UtterancePolicy, or give it a method resample(rollout, knobs, rng)"
                )
            with torch.no_grad():
                self._resampled[member] = policy.resample(self.rollout, self.knobs, self.rng)
            self.spent["drawn"] += int(self.rollout.loss_mask.sum())
        return self._resampled[member]

    def reparameterised(self, member: str = "policy") -> Rollout:
        """The samples as a differentiable function of a member's weights, for judges that a gradient flows through.

        Made once for all objectives (`member.reparameterised(rollout, rng)`): of a flow, the image predicted in one
        step; of a controller, the actions proposed where it acted.

        Raises:
            ValueError: the member has no such function.
        """
        if member not in self._reparameterised:
            policy = self.member(member)
            if not hasattr(policy, "reparameterised"):
                raise ValueError(
                    f"member '{member}' ({type(policy).__name__}) has no samples with a gradient; use a FlowPolicy, an "
                    "ActionPolicy, or give it a method reparameterised(rollout, rng)"
                )
            self._reparameterised[member] = policy.reparameterised(self.rollout, self.rng)
        return self._reparameterised[member]

    def once(self, name: str, compute: Callable[[], Tensor]) -> Tensor:
        """What several objectives need under one name, computed for the first of them; without a gradient."""
        if name not in self._found:
            with torch.no_grad():
                self._found[name] = compute()
        return self._found[name]

    def member(self, name: str) -> Any:
        """A member of the cast; `KeyError` with those there are."""
        if name not in self.cast:
            raise KeyError(f"the cast has no member '{name}'; it has: {', '.join(self.cast)}")
        return self.cast[name]

    def require(self, field_name: str, owner: str, remedy: str) -> Tensor:
        """A field of the rollout, or `ValueError` that says who needs it and how to get it."""
        value: Tensor | None = getattr(self.rollout, field_name)
        if value is None:
            tasks = "/".join(self.rollout.task_names)
            raise ValueError(f"{owner} needs '{field_name}', which the rollout of task {tasks} lacks; {remedy}")
        return value


@dataclass(frozen=True)
class Loss:
    """A loss and what it is made of.

    Attributes:
        total: scalar with a gradient.
        components: named losses as they entered the sum, before weighting, with their gradients.
        metrics: named scalars to log (means over the slice, averaged over slices and steps).
    """

    total: Tensor
    components: dict[str, Tensor]
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Objective(ABC):
    """A loss; `+`, `-` and `*` (by a number or a `Knob`) compose. Subclass it and write `loss`."""

    name: str = "objective"

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that it reads."""
        return ()

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """A scalar loss, or a scalar loss and metrics (scalars to log)."""

    def __call__(self, batch: Batch) -> Loss:
        """The loss with its components and metrics named."""
        result = self.loss(batch)
        value, metrics = result if isinstance(result, tuple) else (result, {})
        if not isinstance(value, Tensor) or value.ndim != 0:
            shown = f"shape {list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ValueError(
                f"objective '{self.name}' returned {shown}, expected one number (a tensor of shape []); weight a loss "
                "per step with batch.weights(...) and sum it"
            )
        return Loss(value, {self.name: value}, {name: torch.as_tensor(metric) for name, metric in metrics.items()})

    def leaves(self) -> Iterator[Objective]:
        """The objectives of a sum; itself otherwise."""
        yield self

    def parts(self) -> Iterator[Objective]:
        """Itself, then what it is made of, each without the weight before it."""
        yield self

    def on(self, *tasks: str) -> TaskObjective:
        """This objective on the samples of some tasks only; the others are not shown to it."""
        return TaskObjective(self, tasks)

    @property
    def term_name(self) -> str:
        """A name for weights and errors."""
        return "+".join(leaf.name for leaf in self.leaves())

    def __add__(self, other: Objective) -> SumObjective:
        if not isinstance(other, Objective):
            return NotImplemented
        return SumObjective([*_terms(self), *_terms(other)])

    def __sub__(self, other: Objective) -> SumObjective:
        if not isinstance(other, Objective):
            return NotImplemented
        return self + -other

    def __neg__(self) -> SumObjective:
        return SumObjective([(weight.times(-1), term) for weight, term in _terms(self)])

    def __mul__(self, other: float | Knob | Weight) -> SumObjective:
        if not isinstance(other, float | int | Knob | Weight):
            return NotImplemented
        if isinstance(self, SumObjective) and not isinstance(other, Knob | Weight):
            return SumObjective([(weight.times(other), term) for weight, term in self.terms])
        return SumObjective([(Weight.of(other, self.term_name), self)])

    __rmul__ = __mul__


class SumObjective(Objective):
    """A weighted sum of objectives, which keeps the named component losses."""

    name = "total"

    def __init__(self, terms: list[tuple[Weight, Objective]]) -> None:
        names = [leaf.name for _, term in terms for leaf in term.leaves()]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two terms of one objective are called {', '.join(twice)}; give one another name")
        self.terms = terms

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The weights, and what the terms read."""
        return tuple(w.knob for w, _ in self.terms) + tuple(k for _, term in self.terms for k in term.knobs)

    def leaves(self) -> Iterator[Objective]:
        """The objectives of all terms."""
        for _, term in self.terms:
            yield from term.leaves()

    def parts(self) -> Iterator[Objective]:
        """Itself, then the parts of all terms."""
        yield self
        for _, term in self.terms:
            yield from term.parts()

    def loss(self, batch: Batch) -> Tensor:
        """The weighted sum."""
        return self(batch).total

    def __call__(self, batch: Batch) -> Loss:
        """The weighted sum; a term of weight 0 is not computed."""
        factors = [(weight.value(batch.knobs), term) for weight, term in self.terms]
        losses = [(factor, term(batch)) for factor, term in factors if factor != 0]
        if not losses:
            raise ValueError(f"every term of the objective has weight 0 ({self.term_name}); learn from at least one")
        total = reduce(add, [loss.total if factor == 1 else factor * loss.total for factor, loss in losses])
        components = {name: value for _, loss in losses for name, value in loss.components.items()}
        metrics = {name: value for _, loss in losses for name, value in loss.metrics.items()}
        return Loss(total, components, metrics)


class TaskObjective(Objective):
    """An objective on the samples of some tasks, whose means are over those alone; 0 where there are none."""

    def __init__(self, objective: Objective, tasks: tuple[str, ...]) -> None:
        if not tasks:
            raise ValueError("Objective.on: name at least one task")
        self.objective, self.tasks, self.name = objective, tasks, objective.name

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the objective reads."""
        return self.objective.knobs

    def leaves(self) -> Iterator[Objective]:
        """Those of the objective."""
        yield from self.objective.leaves()

    def parts(self) -> Iterator[Objective]:
        """Itself, then the parts of the objective on the same tasks."""
        yield self
        for part in list(self.objective.parts())[1:]:
            yield part.on(*self.tasks)

    def loss(self, batch: Batch) -> Tensor:
        """The objective's."""
        return self(batch).total

    def __call__(self, batch: Batch) -> Loss:
        """The objective on a part of the batch."""
        part = batch.of_tasks(*self.tasks)
        if len(part.rollout):
            return self.objective(part)
        zero = torch.zeros((), device=batch.rollout.mask.device)
        return Loss(zero, {leaf.name: zero for leaf in self.leaves()})


def _terms(objective: Objective) -> list[tuple[Weight, Objective]]:
    if isinstance(objective, SumObjective):
        return list(objective.terms)
    return [(Weight.of(1.0, objective.term_name), objective)]
