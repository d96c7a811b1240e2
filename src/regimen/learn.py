"""The learn step: gradient steps of one update, with losses that are not finite kept away from the weights."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from regimen.cast import Cast
from regimen.functions.gradients import conflict, flat_gradient
from regimen.memory import Memory
from regimen.objectives.base import Batch
from regimen.rollout import Rollout
from regimen.update import Update


@dataclass(frozen=True)
class Learned:
    """What the gradient steps of one iteration did.

    Attributes:
        metrics: means over the gradient steps that were taken, named `<update>/<metric>`.
        gradient_steps: how many were taken.
        skipped: how many were not, because the loss or the gradient was not finite.
        first_ratio_deviation: largest `|ratio - 1|` before the first step; 0 for a sound on-policy update.
        drawn: actions drawn anew for samples that were there, see `Batch.resampled`.
    """

    metrics: dict[str, float]
    gradient_steps: int
    skipped: int
    first_ratio_deviation: float | None
    drawn: int = 0


class Learner:
    """One update at work in one stage: it owns the optimiser."""

    def __init__(self, update: Update, cast: Cast) -> None:
        self.update = update
        self._parameters = cast.trainable(update.members)
        self._optimizer = update.build_optimizer(self._parameters)
        self._spent, self._steps = Counter[str](), 0

    @property
    def steps(self) -> int:
        """Gradient steps taken in this stage."""
        return self._steps

    def learn(self, memory: Memory, cast: Cast, knobs: Mapping[str, float], rng: torch.Generator) -> Learned:
        """Take this iteration's gradient steps."""
        self._set_learning_rate(knobs)
        self._spent.clear()
        taken: list[dict[str, Tensor]] = []
        skipped, first = 0, None
        for rollout in self.update.batches(memory, rng, knobs):
            if len(rollout) == 0:
                continue
            accumulate = self._accumulate if self.update.gradients is None else self._combine
            metrics = accumulate(rollout, cast, knobs, rng)
            if first is None and "ratio_deviation" in metrics:
                first = float(metrics["ratio_deviation"])
            norm = self._norm()
            if math.isfinite(float(norm)) and math.isfinite(float(metrics["loss"])):
                self._clip(norm)
                self._optimizer.step()
                # A fused step does not count as a change in place, by which others tell that weights are new.
                torch.autograd.graph.increment_version(self._parameters)
                self._steps += 1
                for rule in self.update.rules:
                    rule.after_step(cast, self._steps)
                taken.append({**metrics, "grad_norm": norm})
            else:
                skipped += 1
        for name in self.update.members:
            if hasattr(cast[name], "version"):
                cast[name].version += len(taken) > 0
        # A minibatch without samples of a task lacks the metrics of that task's objective.
        names = dict.fromkeys(name for step in taken for name in step)
        means = {f"{self.update.name}/{name}": _mean([step[name] for step in taken if name in step]) for name in names}
        return Learned(means, len(taken), skipped, first, self._spent["drawn"])

    def _accumulate(
        self, rollout: Rollout, cast: Cast, knobs: Mapping[str, float], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """Gradients of one minibatch, micro-batch by micro-batch; metrics weighted by their samples."""
        for parameter in self._parameters:
            parameter.grad = None
        size = self.update.micro_batch or len(rollout)
        sums: dict[str, Tensor] = {}
        for start in range(0, len(rollout), size):
            rows = slice(start, start + size)
            part = rollout if size >= len(rollout) else rollout[rows]
            batch = Batch(part, cast, knobs, rng, whole=rollout, rows=rows, spent=self._spent)
            loss = self.update.objective(batch)
            if loss.total.requires_grad:
                loss.total.backward()
            whole = len(part) == len(rollout)
            shares = {n: value.detach() if whole else value.detach() * batch.share for n, value in loss.metrics.items()}
            losses = {f"loss/{name}": value.detach() for name, value in loss.components.items()}
            for name, value in {"loss": loss.total.detach(), **losses, **shares}.items():
                sums[name] = sums[name] + value if name in sums else value
        if all(parameter.grad is None for parameter in self._parameters):
            self._raise_unreached()
        return sums

    def _combine(
        self, rollout: Rollout, cast: Cast, knobs: Mapping[str, float], rng: torch.Generator
    ) -> dict[str, Tensor]:
        """Gradients of one minibatch, put together from those of its tasks; metrics weighted by the tasks' samples."""
        assert self.update.gradients is not None, "only asked where there is a way to put them together"
        whole = Batch(rollout, cast, knobs, rng, spent=self._spent)
        gradients, sums, reached = [], dict[str, Tensor](), False
        for task in (name for place, name in enumerate(rollout.task_names) if bool((rollout.task == place).any())):
            part = whole.of_tasks(task)
            loss, share = self.update.objective(part), len(part.rollout) / len(rollout)
            gradients.append(flat_gradient(share * loss.total, self._parameters))
            losses = {f"loss/{name}": value for name, value in loss.components.items()}
            for name, value in {"loss": loss.total, **losses, **loss.metrics}.items():
                sums[name] = sums.get(name, 0) + share * value.detach()
            reached = reached or loss.total.requires_grad
        if not reached:
            self._raise_unreached()
        together = self.update.gradients(torch.stack(gradients), rng)
        parts = together.split([parameter.numel() for parameter in self._parameters])
        for parameter, gradient in zip(self._parameters, parts, strict=True):
            parameter.grad = gradient.view_as(parameter)
        return {**sums, "gradient_conflict": conflict(torch.stack(gradients))}

    def _raise_unreached(self) -> NoReturn:
        raise ValueError(
            f"update '{self.update.name}': the loss does not depend on any trainable parameter of "
            f"{', '.join(self.update.members)}; check which member the objective trains"
        )

    def _norm(self) -> Tensor:
        """Of all gradients together, `[]`."""
        gradients = self._gradients()
        if len({gradient.device for gradient in gradients}) > 1:
            return torch.nn.utils.get_total_norm(gradients)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))

    def _gradients(self) -> list[Tensor]:
        return [parameter.grad for parameter in self._parameters if parameter.grad is not None]

    def _clip(self, norm: Tensor) -> None:
        """Scale the gradients down to the limit of their norm, if it is above."""
        limit, found = self.update.max_grad_norm, float(norm)
        if limit is not None and found > limit:
            torch._foreach_mul_(self._gradients(), limit / (found + 1e-6))

    def _set_learning_rate(self, knobs: Mapping[str, float]) -> None:
        if not isinstance(self.update.learning_rate, float | int):
            for group in self._optimizer.param_groups:
                group["lr"] = knobs[self.update.learning_rate.name]

    def state_dict(self) -> dict[str, Any]:
        """The optimiser's state, and how many steps it has taken."""
        return {**self._optimizer.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the optimiser."""
        self._steps = int(state.get("steps", 0))
        self._optimizer.load_state_dict({name: value for name, value in state.items() if name != "steps"})


def _mean(values: list[Tensor]) -> float:
    return float(values[0] if len(values) == 1 else torch.stack(values).mean())
