"""What a controller is: it looks at a situation and moves knobs, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout

Moment = Literal["before_collect", "after_judge", "before_learn", "after_learn"]


@dataclass(frozen=True)
class Probe:
    """A small collect, judge and credit of a controller's own, from which nothing is learned.

    Attributes:
        task: what is collected from; not a task of the stage, whose place in its data the probe would move.
        size: samples, in whole groups of the task; they are counted with those of training.
        reward: an expression of rewards, if they are judged.
        credit: what turns the reward into advantages, if anything.
        objective: a loss on these samples, for `Insight.probe_gradient`; over the members of the update that `Needs`
            names.
        evaluating: whether the knobs have their evaluation values (exploration switched off, say).
    """

    task: Any
    size: int
    reward: Any = None
    credit: Any = None
    objective: Any = None
    evaluating: bool = False

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that its parts read."""
        parts = (self.task, self.reward, self.credit, self.objective)
        return tuple(knob for part in parts if part is not None for knob in part.knobs)


@dataclass(frozen=True)
class Needs:
    """What a controller needs beside metrics and knobs, as its attribute `needs`.

    Attributes:
        update: the update whose losses and gradients it may ask for; they are over that update's members. None, if it
            only looks at a probe's samples.
        losses: those that it asks for, by name: of a component (`"sft"`), or of a sum in it (`"surrogate+entropy"`).
        probe: a small rollout of its own.
    """

    update: str | None = None
    losses: tuple[str, ...] = ()
    probe: Probe | None = None


class Insight(Protocol):
    """What a controller that declares `needs` may ask for, at `before_learn`; nothing is computed unless it does.

    Gradients are flat, `[P]` over the trainable parameters of the update's members. Asking changes no weight, no
    `.grad` and none of the random streams of training; what it draws comes from a stream of the controller's own.
    """

    def losses(self, *names: str) -> dict[str, float]:
        """Losses of the update on a minibatch such as it will learn from, before their weights."""
        ...

    def gradients(self, *names: str) -> dict[str, Tensor]:
        """Their gradients, on the same minibatch."""
        ...

    def probe(self) -> Rollout:
        """The probe's samples, judged and credited."""
        ...

    def probe_gradient(self, rollout: Rollout) -> Tensor:
        """The gradient of the probe's objective on them."""
        ...

    def moved(self, by: Tensor) -> AbstractContextManager[None]:
        """Within it the parameters are moved by `by [P]`; then they are what they were, to the bit."""
        ...


@dataclass(frozen=True)
class Situation:
    """What a controller may look at.

    Attributes:
        step: iterations of this stage that are complete (before collecting: of those so far).
        total: iterations that the stage will have, if it knows.
        metrics: this iteration's metrics so far; numbers or arrays, keyed `<what>/<task or component>`.
        knobs: the values in force.
        insight: gradients and a probe, for a controller that declares `needs`.
        notes: numbers that it wants in the log, which it puts here.
    """

    step: int
    total: int | None
    metrics: Mapping[str, Any]
    knobs: Mapping[str, float]
    insight: Insight | None = None
    notes: dict[str, float] = field(default_factory=dict)


@runtime_checkable
class Controller(Protocol):
    """Moves named knobs. One that needs gradients or a probe has an attribute `needs` besides (see `Needs`).

    Attributes:
        moves: the knobs that it moves; two controllers never move the same one.
        moment: when it acts in an iteration.
    """

    @property
    def moment(self) -> Moment:
        """When in an iteration it acts."""
        ...

    @property
    def moves(self) -> tuple[str, ...]:
        """The knobs that it moves."""
        ...

    def __call__(self, situation: Situation) -> Mapping[str, float]:
        """New values of some of the knobs in `moves`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """State for an exact resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...


def needs_of(controller: Controller) -> Needs | None:
    """What a controller declares that it needs, if anything."""
    needs: Needs | None = getattr(controller, "needs", None)
    return needs
