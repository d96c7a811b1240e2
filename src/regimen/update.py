"""Updates: which objective trains which members, with which optimiser, on which samples, how often."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from regimen.cast import CastRule
from regimen.knobs import Knob
from regimen.memory import Memory, ReplayMemory
from regimen.objectives.base import Objective
from regimen.rollout import Rollout

Combine: TypeAlias = Callable[[Tensor, torch.Generator], Tensor]
"""Gradients `[K, P]` of `K` tasks to one, `[P]`, with a random stream to draw from."""

NO_KNOBS: Mapping[str, float] = MappingProxyType({})


class Batches(Protocol):
    """Chooses the minibatches of one iteration; each is one gradient step. One that reads knobs has them as `knobs`."""

    def __call__(self, memory: Memory, rng: torch.Generator, knobs: Mapping[str, float]) -> Iterator[Rollout]:
        """The minibatches, in order."""
        ...


@dataclass(frozen=True)
class Epochs:
    """Passes over the newest rollout, each shuffled and split into minibatches of equal size (to within one).

    Attributes:
        epochs: passes.
        minibatches: per pass.
        unit: what is shuffled: whole samples, or single steps (as PPO does; not for a policy with memory, which is
            replayed from a sample's start).
        tasks: only their samples, all by default; members that play different parts have each an update of its own.
    """

    epochs: int = 1
    minibatches: int = 1
    unit: Literal["sample", "step"] = "sample"
    tasks: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1 or self.unit not in ("sample", "step"):
            raise ValueError(
                f"Epochs({self.epochs}, {self.minibatches}, {self.unit!r}): expected at least 1 of each, and a unit "
                "'sample' or 'step'"
            )
        if isinstance(self.tasks, str):
            raise ValueError(f"Epochs: tasks is the text '{self.tasks}'; expected a list of names")

    def __call__(
        self, memory: Memory, rng: torch.Generator, knobs: Mapping[str, float] = NO_KNOBS
    ) -> Iterator[Rollout]:
        """`epochs * minibatches` minibatches; samples without any step to learn from are left out.

        Raises:
            ValueError: single steps of a policy with memory.
        """
        rollout = memory.newest()
        if self.tasks:
            rollout = rollout[_of_tasks(rollout, self.tasks)]
        if self.unit == "step":
            if rollout.get("memory") is not None:
                raise ValueError(
                    f"Epochs(unit='step') was given samples of task {'/'.join(rollout.task_names)} with a column "
                    "'memory': a policy with memory is replayed from a sample's start; use unit='sample'"
                )
            rollout = rollout.unrolled(rollout.loss_mask)
        alive = rollout.loss_mask.any(1)
        if not bool(alive.all()):
            rollout = rollout[alive]
        for _ in range(self.epochs):
            if self.minibatches == 1:
                yield rollout
                continue
            order = torch.randperm(len(rollout), generator=rng, device=rng.device)
            if self.unit == "sample":
                for index in order.tensor_split(self.minibatches):
                    yield rollout[index]
                continue
            # Steps are small: each field that is read is shuffled once, and cut.
            shuffled, end = rollout[order], 0
            for index in order.tensor_split(self.minibatches):
                end += len(index)
                yield shuffled[end - len(index) : end]


def _of_tasks(rollout: Rollout, tasks: Sequence[str]) -> Tensor:
    """Bool `[B]`, the samples of some tasks."""
    wanted = [place for place, name in enumerate(rollout.task_names) if name in tasks]
    return torch.isin(rollout.task, torch.tensor(wanted, dtype=torch.int64, device=rollout.task.device))


@dataclass(frozen=True)
class Draws:
    """Minibatches drawn from the memory, uniformly with replacement.

    Attributes:
        steps: minibatches in an iteration: a number, or a `Knob` of whole numbers that a controller may move, such as
            `Knob("steps/policy", 3, 0, integer=True)`; with 0 the update takes no gradient step.
        size: samples in each.
        after: none is drawn while the memory holds fewer samples than this.
        best: of this share of the samples that are kept, those with the largest total reward; ties with the last of
            them are drawn, too.
    """

    steps: int | Knob
    size: int
    after: int = 0
    best: float = 1.0

    def __post_init__(self) -> None:
        steps = self.steps.default if isinstance(self.steps, Knob) else self.steps
        if steps < (0 if isinstance(self.steps, Knob) else 1) or self.size < 1 or self.after < 0:
            raise ValueError(
                f"Draws({steps:g}, {self.size}, after={self.after}): expected at least 1 of each, and after >= 0"
            )
        if not 0 < self.best <= 1:
            raise ValueError(f"Draws: best is {self.best}, expected a share above 0, up to 1")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The number of steps, if it is one."""
        return (self.steps,) if isinstance(self.steps, Knob) else ()

    def __call__(
        self, memory: Memory, rng: torch.Generator, knobs: Mapping[str, float] = NO_KNOBS
    ) -> Iterator[Rollout]:
        """`steps` minibatches of `size` samples.

        Raises:
            ValueError: the best are asked for and the samples have no reward.
        """
        steps = int(knobs[self.steps.name]) if isinstance(self.steps, Knob) else self.steps
        if len(memory) < self.after or steps == 0:
            return
        best = self._best(memory) if self.best < 1 else None
        for _ in range(steps):
            if best is None:
                yield memory.sample(self.size, rng)
            else:
                yield best[torch.randint(len(best), (self.size,), generator=rng, device=rng.device)]

    def _best(self, memory: Memory) -> Rollout:
        """The samples whose total reward is at or above the quantile `1 - best` of all that are kept."""
        kept = memory.last() if isinstance(memory, ReplayMemory) else memory.newest()
        if kept.reward is None:
            raise ValueError("Draws(best=...): the samples have no reward; give the stage a reward that trains")
        total = kept.reward if kept.reward.ndim == 1 else (kept.reward * kept.mask).sum(1)
        # The value itself, not one between two of them, which equal rewards would lie below.
        order = total.sort(descending=True).values
        found: Rollout = kept[total >= order[max(math.ceil(self.best * len(kept)) - 1, 0)]]
        return found


@dataclass(frozen=True)
class Update:
    """An objective, the members it trains, and how.

    Attributes:
        objective: the loss.
        members: names in the cast whose trainable parameters the optimiser holds.
        learning_rate: a number, or a `Knob` that a controller may move.
        optimizer: a `torch.optim` class, made afresh at every stage's start.
        options: its further keyword arguments; an optimiser that can take its step in one pass (`fused`) does so unless
            they say otherwise.
        batches: which minibatches an iteration takes; each is one gradient step.
        every: learn only in every so many-th iteration.
        max_grad_norm: gradients are scaled down to this norm; `None` for no limit.
        rules: refresh frozen copies in the cast after every gradient step, as a stage's do after every iteration.
        micro_batch: samples per backward pass; gradients add up to the minibatch's exactly.
        gradients: puts the gradients `[K, P]` of the `K` tasks of a minibatch together to `[P]`, such as
            `regimen.functions.gradients.pcgrad`; by default they are summed, at once. Every task's is that of its
            samples' loss times their share of the minibatch, and costs a backward pass of its own.
        name: prefix of its metrics.
    """

    objective: Objective
    members: Sequence[str] = ("policy",)
    learning_rate: float | Knob = 3e-4
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW
    options: Mapping[str, Any] = field(default_factory=dict)
    batches: Batches = Epochs()
    every: int = 1
    max_grad_norm: float | None = 1.0
    rules: Sequence[CastRule] = ()
    micro_batch: int | None = None
    gradients: Combine | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.every < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise ValueError(f"Update: every={self.every}, micro_batch={self.micro_batch}; expected at least 1")
        if self.gradients is not None and self.micro_batch is not None:
            raise ValueError(
                f"Update: micro_batch={self.micro_batch} beside gradients={self.gradients}; gradients of tasks are put "
                "together of whole minibatches; leave micro_batch out and draw smaller minibatches"
            )
        if isinstance(self.members, str):
            raise ValueError(f"Update: members is the text '{self.members}'; expected a list of names")
        if not self.name:
            object.__setattr__(self, "name", "+".join(self.members))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the objective and the choice of minibatches read, and the learning rate if it is one."""
        rate = (self.learning_rate,) if isinstance(self.learning_rate, Knob) else ()
        return (*self.objective.knobs, *rate, *getattr(self.batches, "knobs", ()))

    def build_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        """A fresh optimiser over some parameters."""
        rate = self.learning_rate.default if isinstance(self.learning_rate, Knob) else self.learning_rate
        options = {**self._quick(parameters), **self.options}
        return self.optimizer(parameters, lr=rate, **options)  # type: ignore[call-arg]

    def _quick(self, parameters: Sequence[nn.Parameter]) -> dict[str, bool]:
        settled = {"fused", "foreach", "differentiable"} & set(self.options)
        fits = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for p in parameters)
        can = "fused" in inspect.signature(self.optimizer).parameters
        return {"fused": True} if can and fits and not settled else {}
