"""What a controller that needs more than metrics is handed: gradients of an update's losses, and a probe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from regimen.cast import Cast
from regimen.controllers.base import Needs, Probe
from regimen.functions.gradients import flat_gradient
from regimen.knobs import Knobs
from regimen.memory import Memory
from regimen.objectives.base import Batch, Objective
from regimen.rewards.base import Scene
from regimen.rewards.judge import judge
from regimen.rollout import Rollout
from regimen.update import Update

Charge = Callable[[Any, int], None]
"""`(task, size)`: counts what was collected."""


class StageInsight:
    """An `Insight` into one update of a stage, or into a probe alone, for one controller.

    It owns the stream that its asking draws from.
    """

    def __init__(self, needs: Needs, update: Update | None, cast: Cast, knobs: Knobs, timeout_s: float | None) -> None:
        self.needs, self._update, self.cast, self.knobs, self.timeout_s = needs, update, cast, knobs, timeout_s
        self._parts = {} if update is None else {part.term_name: part for part in update.objective.parts()}
        self._rng = torch.Generator(cast.device)
        self._memory: Memory | None = None
        self._minibatch: Rollout | None = None
        self._charge: Charge = _free

    def seed(self, seed: int) -> None:
        """Begin the stream of a fresh stage."""
        self._rng.manual_seed(seed)

    def at(self, memory: Memory, charge: Charge) -> StageInsight:
        """Itself, in the present iteration."""
        self._memory, self._charge, self._minibatch = memory, charge, None
        return self

    def losses(self, *names: str) -> dict[str, float]:
        """See `Insight`."""
        with torch.no_grad(), self._own_randomness():
            found = dict.fromkeys(names, 0.0)
            for batch in self._batches(self._drawn()):
                for name in names:
                    found[name] += float(self._named(name)(batch).total)
            return found

    def gradients(self, *names: str) -> dict[str, Tensor]:
        """See `Insight`."""
        return self._gradients({name: self._named(name) for name in names}, self._drawn())

    def probe(self) -> Rollout:
        """See `Insight`."""
        probe = self._probe()
        knobs: Mapping[str, float] = self.knobs.for_evaluation() if probe.evaluating else self.knobs
        with self._own_randomness():
            rollout: Rollout = probe.task.collect(self.cast, knobs, self._rng, probe.size)
            self._charge(probe.task, probe.size)
            if probe.reward is not None:
                rollout, _ = judge(probe.reward, rollout, Scene(self.cast, knobs, self.timeout_s))
            return rollout if probe.credit is None else probe.credit(rollout, knobs, self.cast)

    def probe_gradient(self, rollout: Rollout) -> Tensor:
        """See `Insight`."""
        objective = self._probe().objective
        if objective is None:
            raise ValueError("the probe has no objective to take the gradient of; give Probe(objective=...)")
        return self._gradients({"probe": objective}, rollout)["probe"]

    @contextmanager
    def moved(self, by: Tensor) -> Iterator[None]:
        """See `Insight`."""
        parameters = self.cast.trainable(self.update.members)
        before = [parameter.detach().clone() for parameter in parameters]
        parts = by.split([parameter.numel() for parameter in parameters])
        try:
            with torch.no_grad():
                for parameter, part in zip(parameters, parts, strict=True):
                    parameter.add_(part.view_as(parameter).to(parameter))
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, before, strict=True):
                    parameter.copy_(value)

    def _gradients(self, losses: Mapping[str, Objective], rollout: Rollout) -> dict[str, Tensor]:
        parameters = self.cast.trainable(self.update.members)
        found: dict[str, Tensor] = {}
        with self._own_randomness(), torch.enable_grad():
            for batch in self._batches(rollout):
                for name, objective in losses.items():
                    gradient = flat_gradient(objective(batch).total, parameters)
                    found[name] = gradient if name not in found else found[name].add_(gradient)
        return found

    def _batches(self, rollout: Rollout) -> Iterator[Batch]:
        """A minibatch, in parts that fit the memory; their losses add up to its own."""
        size = self.update.micro_batch or max(len(rollout), 1)
        for start in range(0, len(rollout), size):
            rows = slice(start, start + size)
            part = rollout if size >= len(rollout) else rollout[rows]
            yield Batch(part, self.cast, self.knobs, self._rng, whole=rollout, rows=rows)

    def _drawn(self) -> Rollout:
        """One minibatch, drawn as the update draws its own."""
        if self._memory is None:
            raise ValueError("an insight is for the moment before_learn of an iteration; set the controller's `moment`")
        if self._minibatch is None:
            self._minibatch = next(iter(self.update.batches(self._memory, self._rng, self.knobs)), None)
        if self._minibatch is None:
            raise ValueError(
                f"update '{self.update.name}' draws no minibatch yet (its memory fills); start the controller later"
            )
        return self._minibatch

    @property
    def update(self) -> Update:
        """The update that it looks into."""
        if self._update is None:
            raise ValueError("the controller asks for gradients, and its needs name no update; give Needs(update=...)")
        return self._update

    def _named(self, name: str) -> Objective:
        if name not in self.needs.losses:
            raise ValueError(
                f"the controller asks for loss '{name}', which its needs do not declare: {', '.join(self.needs.losses)}"
            )
        return self._parts[name]

    def _probe(self) -> Probe:
        if self.needs.probe is None:
            raise ValueError("the controller asks for a probe, which its needs do not declare; give Needs(probe=...)")
        return self.needs.probe

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """What draws from torch's global streams (dropout) leaves them as they were."""
        device = self.cast.device
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The stream, and what the probe's parts remember."""
        probe = self.needs.probe
        state: dict[str, Any] = {"rng": self._rng.get_state(), "task": {}, "reward": {}}
        if probe is not None:
            state["task"] = probe.task.state_dict()
            state["reward"] = {} if probe.reward is None else probe.reward.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._rng.set_state(state["rng"])
        if self.needs.probe is not None:
            self.needs.probe.task.load_state_dict(state["task"])
            if self.needs.probe.reward is not None:
                self.needs.probe.reward.load_state_dict(state["reward"])


def _free(task: Any, size: int) -> None:
    """Counts nothing."""
