"""A regimen: a cast and a list of stages, checked when it is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from regimen.cast import Cast, CastRule
from regimen.controllers.base import Controller, Needs, Probe, needs_of
from regimen.credit.base import Credit
from regimen.knobs import Knob, Knobs
from regimen.memory import Memory, NewestRollout
from regimen.rewards.base import Expression
from regimen.tasks.base import Task
from regimen.update import Update


class Prepare(Protocol):
    """Something done once before a stage's loop: fit a reward, score a corpus, relabel a data set."""

    def __call__(self, cast: Cast, tasks: Sequence[Task], memory: Memory) -> None:
        """Do it. What it leaves must be in the cast, a task, the memory or a reward, which are checkpointed."""
        ...


@dataclass
class Stage:
    """Collect, judge, credit, learn, adapt, `steps` times. Any verb may be empty.

    Attributes:
        name: unique within the regimen.
        tasks: what is collected from; with several, knobs `mixture/<task>` (default 1 each) share out the batch.
        steps: iterations.
        batch_size: samples per iteration over all tasks.
        reward: an expression of reward components.
        credit: turns the judged rollout into advantages.
        updates: taken in order in every iteration.
        controllers: move knobs.
        rules: refresh frozen copies in the cast.
        prepare: done once before the first iteration.
        memory: a class or function makes one afresh at the stage's start; an instance is kept, with what it holds, and
            may be shared by stages.
        knobs: values of this stage that replace the defaults.
        stop: given an iteration's metrics, ends the stage early.
        evaluate_every: iterations between evaluations; always at the stage's end.
        reward_timeout_s: limit for one component's answer, in seconds.
        max_failed_share: the run stops when a larger share of the last samples failed to be judged.
        max_skipped: gradient steps in a row that may be skipped as not finite before `on_nonfinite` acts.
        on_nonfinite: `"stop"` the run, or `"restore"` the last good checkpoint (with a new random stream).
    """

    name: str
    tasks: Sequence[Task]
    steps: int
    batch_size: int = 256
    reward: Expression | None = None
    credit: Credit | None = None
    updates: Sequence[Update] = ()
    controllers: Sequence[Controller] = ()
    rules: Sequence[CastRule] = ()
    prepare: Sequence[Prepare] = ()
    memory: Memory | Callable[[], Memory] = NewestRollout
    knobs: Mapping[str, float] = field(default_factory=dict)
    stop: Callable[[Mapping[str, float]], bool] | None = None
    evaluate_every: int | None = None
    reward_timeout_s: float | None = 60.0
    max_failed_share: float = 0.5
    max_skipped: int = 5
    on_nonfinite: Literal["stop", "restore"] = "stop"

    def __post_init__(self) -> None:
        if self.steps < 0 or self.batch_size < 1 or not self.tasks:
            raise ValueError(
                f"stage '{self.name}': steps={self.steps}, batch_size={self.batch_size}, {len(self.tasks)} tasks; "
                "expected steps >= 0, batch_size >= 1 and at least one task"
            )
        _unique([task.name for task in self.tasks], f"tasks of stage '{self.name}'")
        _unique([update.name for update in self.updates], f"updates of stage '{self.name}'")

    def declared(self) -> Iterator[tuple[str, Knob]]:
        """(owner, knob) for everything that the stage's parts read."""
        for task in self.tasks:
            yield from ((f"task '{task.name}'", knob) for knob in task.knobs)
            if len(self.tasks) > 1:
                yield f"stage '{self.name}'", Knob(f"mixture/{task.name}", 1.0, low=0.0)
        parts: list[tuple[str, Any]] = [("the reward", self.reward), ("the credit", self.credit)]
        parts += [(f"update '{update.name}'", update) for update in self.updates]
        for owner, part in parts:
            if part is not None:
                yield from ((owner, knob) for knob in part.knobs)
        for controller in self.controllers:
            needs = needs_of(controller)
            if needs is not None and needs.probe is not None:
                yield from ((f"the probe of {type(controller).__name__}", knob) for knob in needs.probe.knobs)

    def board(self, cast: Cast, overrides: Mapping[str, float]) -> Knobs:
        """The knobs in force in this stage.

        Raises:
            ValueError: a controller moves a knob that nobody reads, or two move the same one, or a setting names
                a knob that the stage does not have.
        """
        declared = [*cast.knobs, *self.declared()]
        there = {knob.name for _, knob in declared}
        board = Knobs(declared, {k: v for k, v in overrides.items() if k in there} | dict(self.knobs))
        movers: dict[str, str] = {}
        for controller in self.controllers:
            owner = f"controller {type(controller).__name__} of stage '{self.name}'"
            for name in controller.moves:
                if name not in board:
                    raise ValueError(f"{owner} moves '{name}', but {board.unknown(name)}")
                if name in movers:
                    raise ValueError(f"knob '{name}' is moved by two controllers: {movers[name]} and {owner}")
                movers[name] = owner
            if (needs := needs_of(controller)) is not None:
                self._check_needs(needs, controller, owner)
        return board

    def _check_needs(self, needs: Needs, controller: Controller, owner: str) -> None:
        if controller.moment != "before_learn":
            raise ValueError(
                f"{owner} needs gradients or a probe and acts at '{controller.moment}'; they are there at "
                "'before_learn'"
            )
        if needs.update is None:
            if needs.losses or (needs.probe is not None and needs.probe.objective is not None):
                raise ValueError(
                    f"{owner} needs losses or the gradient of a probe, and names no update; give Needs(update=...)"
                )
        else:
            self._check_losses(needs, owner)
        if needs.probe is not None:
            self._check_probe(needs.probe, owner)

    def _check_losses(self, needs: Needs, owner: str) -> None:
        update = next((update for update in self.updates if update.name == needs.update), None)
        if update is None:
            there = ", ".join(update.name for update in self.updates) or "none"
            raise ValueError(f"{owner} needs the update '{needs.update}', and the stage's updates are: {there}")
        losses = list(dict.fromkeys(part.term_name for part in update.objective.parts()))
        if absent := [name for name in needs.losses if name not in losses]:
            raise ValueError(
                f"{owner} needs the loss '{absent[0]}' of update '{update.name}', whose losses are: {', '.join(losses)}"
            )

    def _check_probe(self, probe: Probe, owner: str) -> None:
        name, group = probe.task.name, probe.task.group_size
        if any(task is probe.task for task in self.tasks):
            raise ValueError(
                f"{owner} probes the stage's own task '{name}', whose place in its data the probe would move; give the "
                "probe a task of its own"
            )
        if probe.size < 1 or probe.size % group:
            raise ValueError(
                f"{owner} probes task '{name}' with size {probe.size}; expected a multiple of its group_size {group}"
            )


@dataclass
class Regimen:
    """A prescribed course of training.

    Attributes:
        cast: the members trained and used.
        stages: in order.
        evaluations: tasks evaluated after every stage; all tasks of all stages by default.
        knobs: values that replace defaults in every stage that has them.

    Raises:
        ValueError: when a knob, a member or a name does not fit; see `Stage.board`.
    """

    cast: Cast
    stages: Sequence[Stage]
    evaluations: Sequence[Task] | None = None
    knobs: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _unique([stage.name for stage in self.stages], "stages")
        boards = [stage.board(self.cast, self.knobs) for stage in self.stages]
        for name in self.knobs:
            if boards and not any(name in board for board in boards):
                raise ValueError(f"Regimen(knobs=...): {boards[0].unknown(name)}")
        for stage in self.stages:
            for update in stage.updates:
                for member in update.members:
                    if member not in self.cast and not stage.rules and not stage.prepare:
                        raise ValueError(
                            f"update '{update.name}' of stage '{stage.name}' trains '{member}', which is not in the "
                            f"cast: {', '.join(self.cast)}"
                        )

    def evaluation_knobs(self, stage: Stage) -> dict[str, float]:
        """What is in force in an evaluation during a stage: its board, and what evaluated tasks read beside it."""
        board = stage.board(self.cast, self.knobs)
        declared = [(f"task '{task.name}'", knob) for task in self.evaluated() for knob in task.knobs]
        others = Knobs((owner, knob) for owner, knob in declared if knob.name not in board)
        given = {name: value for name, value in self.knobs.items() if name in others}
        return {**others.for_evaluation(), **given, **board.for_evaluation()}

    def evaluated(self) -> list[Task]:
        """The tasks that are evaluated, each once."""
        tasks = self.evaluations
        if tasks is None:
            tasks = [task for stage in self.stages for task in stage.tasks]
        return list({task.name: task for task in tasks}.values())


def _unique(names: Sequence[str], what: str) -> None:
    for name in names:
        if not name or "/" in name or not name.isprintable():
            raise ValueError(f"{what}: {name!r} names files and metrics; expected printable characters without '/'")
    twice = sorted({name for name in names if list(names).count(name) > 1})
    if twice:
        raise ValueError(f"{what}: {', '.join(twice)} occur twice; names must be unique")
