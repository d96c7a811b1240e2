"""Updates: which objective trains which members, with which optimiser, on which samples, how often."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import nn

from regimen.knobs import Knob
from regimen.memory import Memory
from regimen.objectives.base import Objective
from regimen.rollout import Rollout


class Batches(Protocol):
    """Chooses the minibatches of one iteration; each is one gradient step."""

    def __call__(self, memory: Memory, rng: torch.Generator) -> Iterator[Rollout]:
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
    """

    epochs: int = 1
    minibatches: int = 1
    unit: Literal["sample", "step"] = "sample"

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.minibatches < 1 or self.unit not in ("sample", "step"):
            raise ValueError(
                f"Epochs({self.epochs}, {self.minibatches}, {self.unit!r}): expected at least 1 of each, and a unit "
                "'sample' or 'step'"
            )

    def __call__(self, memory: Memory, rng: torch.Generator) -> Iterator[Rollout]:
        """`epochs * minibatches` minibatches; samples without any step to learn from are left out.

        Raises:
            ValueError: single steps of a policy with memory.
        """
        rollout = memory.newest()
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
            for index in order.tensor_split(self.minibatches):
                yield rollout[index]


@dataclass(frozen=True)
class Draws:
    """Minibatches drawn from the memory, uniformly with replacement.

    Attributes:
        steps: minibatches in an iteration.
        size: samples in each.
        after: none is drawn while the memory holds fewer samples than this.
    """

    steps: int
    size: int
    after: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.size < 1 or self.after < 0:
            raise ValueError(
                f"Draws({self.steps}, {self.size}, after={self.after}): expected at least 1 of each, and after >= 0"
            )

    def __call__(self, memory: Memory, rng: torch.Generator) -> Iterator[Rollout]:
        """`steps` minibatches of `size` samples."""
        if len(memory) < self.after:
            return
        for _ in range(self.steps):
            yield memory.sample(self.size, rng)


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
        micro_batch: samples per backward pass; gradients add up to the minibatch's exactly.
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
    micro_batch: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.every < 1 or (self.micro_batch is not None and self.micro_batch < 1):
            raise ValueError(f"Update: every={self.every}, micro_batch={self.micro_batch}; expected at least 1")
        if isinstance(self.members, str):
            raise ValueError(f"Update: members is the text '{self.members}'; expected a list of names")
        if not self.name:
            object.__setattr__(self, "name", "+".join(self.members))

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """What the objective reads, and the learning rate if it is one."""
        rate = (self.learning_rate,) if isinstance(self.learning_rate, Knob) else ()
        return self.objective.knobs + rate

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
