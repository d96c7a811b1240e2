"""One turn of the loop: collect, judge, credit, learn, adapt."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regimen.controllers.base import Controller, Moment, Situation, needs_of
from regimen.functions.aggregate import mean_of
from regimen.health import HealthMonitor
from regimen.insight import StageInsight
from regimen.learn import Learner
from regimen.memory import Memory
from regimen.regimen import Regimen, Stage
from regimen.rewards.base import SCORED, Scene
from regimen.rewards.judge import JudgeReport, judge
from regimen.rollout import Rollout
from regimen.runs import RunError
from regimen.tasks.base import Task

FAILURE_WINDOW = 20


@dataclass
class Counters:
    """What a run has spent so far.

    Attributes:
        stage: index of the stage at work; step: iterations of it that are complete.
        iterations: iterations over all stages.
        samples: generated samples; rows: samples read from data; gradient_steps: optimiser steps taken.
        drawn: actions that a policy drew anew for samples that were there, to learn from; no environment answered them.
        skipped: gradient steps not taken because they were not finite.
        seconds: time in starts of stages and in iterations, evaluations and checkpoints left out.
    """

    stage: int = 0
    step: int = 0
    iterations: int = 0
    samples: int = 0
    rows: int = 0
    gradient_steps: int = 0
    drawn: int = 0
    skipped: int = 0
    seconds: float = 0.0

    def charge(self, task: Task, size: int) -> None:
        """Count what was collected from a task."""
        self.samples += size if task.generates else 0
        self.rows += 0 if task.generates else size


class StageRun:
    """One stage at work: all that an iteration needs and, beside the cast, all that a checkpoint must hold."""

    def __init__(self, regimen: Regimen, stage: Stage) -> None:
        self.stage, self.cast = stage, regimen.cast
        self.board = stage.board(regimen.cast, regimen.knobs)
        self.memory: Memory = stage.memory() if callable(stage.memory) else stage.memory
        self.health = HealthMonitor()
        self.learners: list[Learner] = []
        self._insights = {id(controller): insight for controller, insight in self._insights_of(stage)}
        self._owed = {task.name: 0.0 for task in stage.tasks}
        self._failures: deque[tuple[int, int]] = deque(maxlen=FAILURE_WINDOW)
        self.skipped_in_row = 0

    def start(self, fresh: bool) -> None:
        """Apply rules and prepare steps (when fresh), then make the optimisers."""
        if fresh:
            for rule in (*self.stage.rules, *(rule for update in self.stage.updates for rule in update.rules)):
                rule.start(self.cast)
            for prepare in self.stage.prepare:
                prepare(self.cast, self.stage.tasks, self.memory)
        self.cast.train_only({member for update in self.stage.updates for member in update.members})
        self.learners = [Learner(update, self.cast) for update in self.stage.updates]

    def _insights_of(self, stage: Stage) -> Iterator[tuple[Controller, StageInsight]]:
        updates = {update.name: update for update in stage.updates}
        for controller in stage.controllers:
            if (needs := needs_of(controller)) is not None:
                update = None if needs.update is None else updates[needs.update]
                yield controller, StageInsight(needs, update, self.cast, self.board, stage.reward_timeout_s)

    def iterate(self, step: int, counters: Counters, rng: torch.Generator) -> dict[str, float]:
        """One turn of the five verbs; returns its metrics."""
        metrics: dict[str, float] = {}
        if step == 0:
            self._seed_insights(rng.initial_seed() + counters.stage)
        self._adapt("before_collect", step, metrics)
        in_force = {f"knob/{name}": value for name, value in self.board.items()}
        rollout = self._collect(rng, counters)
        rollout = self._judge(rollout, metrics)
        self._adapt("after_judge", step, metrics)
        if self.stage.credit is not None:
            judged = rollout
            rollout = self.stage.credit(judged, self.board, self.cast)
            metrics.update(credit_metrics(judged, rollout))
        self.memory.add(rollout)
        self._adapt("before_learn", step, metrics, counters)
        in_force |= {f"knob/{name}": self.board[name] for name in self._moved("before_learn")}
        self._learn(rollout, step, metrics, counters, rng)
        self._adapt("after_learn", step + 1, metrics)
        for rule in self.stage.rules:
            rule.after_step(self.cast, step + 1)
        return metrics | in_force

    def _collect(self, rng: torch.Generator, counters: Counters) -> Rollout:
        parts, sizes = [], self._sizes()
        for task in self.stage.tasks:
            if size := sizes[task.name]:
                parts.append(task.collect(self.cast, self.board, rng, size))
                counters.charge(task, size)
        return Rollout.cat(parts)

    def _sizes(self) -> dict[str, int]:
        """Samples per task: whole groups, and what rounding withholds is paid out in later iterations."""
        shares = {task.name: self._share(task.name) for task in self.stage.tasks}
        groups = {task.name: task.group_size for task in self.stage.tasks}
        return allocate(shares, self.stage.batch_size, groups, self._owed)

    def _judge(self, rollout: Rollout, metrics: dict[str, float]) -> Rollout:
        if self.stage.reward is None:
            return rollout
        scene = Scene(self.cast, self.board, self.stage.reward_timeout_s)
        rollout, report = judge(self.stage.reward, rollout, scene)
        metrics.update(reward_metrics(rollout, report))
        self._failures.append((report.failed, len(rollout)))
        failed, total = (sum(column) for column in zip(*self._failures, strict=True))
        if failed > self.stage.max_failed_share * total:
            raise RunError(
                f"{failed} of the last {total} samples could not be judged, over the share of "
                f"{self.stage.max_failed_share:g} that stage '{self.stage.name}' allows (max_failed_share). "
                f"First failures: {'; '.join(report.errors) or 'earlier in the run'}. Mend the reward, or run it apart "
                "with IsolatedReward; the run continues from its last checkpoint"
            )
        return rollout

    def _learn(
        self, rollout: Rollout, step: int, metrics: dict[str, float], counters: Counters, rng: torch.Generator
    ) -> None:
        skipped, taken, first = 0, 0, None
        for learner in self.learners:
            if step % learner.update.every:
                continue
            learned = learner.learn(self.memory, self.cast, self.board, rng)
            metrics.update({**learned.metrics, f"{learner.update.name}/steps": learner.steps})
            skipped, taken = skipped + learned.skipped, taken + learned.gradient_steps
            counters.drawn += learned.drawn
            first = learned.first_ratio_deviation if first is None else first
        counters.gradient_steps += taken
        counters.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + skipped if skipped and not taken else 0
        asked = [task for task in self.stage.tasks if self._share(task.name) > 0]
        expected = tuple(name for task in asked for name in getattr(task, "collects", (task.name,)))
        metrics.update(
            self.health.observe(rollout, metrics, expected_tasks=expected, first_ratio_deviation=first, skipped=skipped)
        )

    def _share(self, task: str) -> float:
        return self.board[f"mixture/{task}"] if len(self.stage.tasks) > 1 else 1.0

    def _adapt(self, moment: Moment, step: int, metrics: dict[str, float], counters: Counters | None = None) -> None:
        for controller in self.stage.controllers:
            if controller.moment == moment:
                insight = self._insights.get(id(controller))
                if insight is not None and counters is not None:
                    insight.at(self.memory, counters.charge)
                situation = Situation(step, self.stage.steps, metrics, self.board, insight)
                for name, value in controller(situation).items():
                    self.board.set(name, value, by=type(controller).__name__)
                metrics.update({f"adapt/{name}": value for name, value in situation.notes.items()})

    def _moved(self, moment: Moment) -> list[str]:
        """The knobs that are moved at a moment."""
        return [
            name for controller in self.stage.controllers if controller.moment == moment for name in controller.moves
        ]

    def _seed_insights(self, seed: int) -> None:
        """Each controller's own stream, told apart from training's and from each other's."""
        for index, insight in enumerate(self._insights.values()):
            insight.seed((1_000_003 * (seed + 1) + 7919 * (index + 1)) % 2**63)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the cast."""
        return {
            "knobs": self.board.state_dict(),
            "memory": self.memory.state_dict(),
            "learners": [learner.state_dict() for learner in self.learners],
            "controllers": [controller.state_dict() for controller in self.stage.controllers],
            "insights": [insight.state_dict() for insight in self._insights.values()],
            "tasks": [task.state_dict() for task in self.stage.tasks],
            "reward": self.stage.reward.state_dict() if self.stage.reward is not None else {},
            "health": self.health.state_dict(),
            "owed": dict(self._owed),
            "failures": [list(pair) for pair in self._failures],
            "skipped_in_row": self.skipped_in_row,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave, after `start(fresh=False)`."""
        self.board.load_state_dict(state["knobs"])
        self.memory.load_state_dict(state["memory"])
        insights = self._insights.values()
        parts: list[Any] = [*self.learners, *self.stage.controllers, *insights, *self.stage.tasks]
        saved = [*state["learners"], *state["controllers"], *state["insights"], *state["tasks"]]
        for part, entry in zip(parts, saved, strict=True):
            part.load_state_dict(entry)
        if self.stage.reward is not None:
            self.stage.reward.load_state_dict(state["reward"])
        self.health.load_state_dict(state["health"])
        self._owed.update(state["owed"])
        self._failures.extend(tuple(pair) for pair in state["failures"])
        self.skipped_in_row = int(state["skipped_in_row"])


def allocate(
    shares: Mapping[str, float], batch_size: int, group_sizes: Mapping[str, int], owed: dict[str, float]
) -> dict[str, int]:
    """Samples per task, in whole groups, in proportion to `shares`; `owed` carries rounding to the next call.

    Raises:
        ValueError: a share is negative, or all are 0.
    """
    total = sum(shares.values())
    if total <= 0 or min(shares.values()) < 0:
        raise ValueError(f"mixture shares are {dict(shares)}; expected none negative and one above 0")
    sizes = {}
    for name, share in shares.items():
        owed[name] = owed[name] + share / total * batch_size / group_sizes[name] if share > 0 else 0.0
        groups = int(owed[name] + 1e-6)
        owed[name] -= groups
        sizes[name] = groups * group_sizes[name]
    if not any(sizes.values()):
        first = max(owed, key=lambda name: owed[name])
        owed[first] -= 1
        sizes[first] = group_sizes[first]
    return sizes


def reward_metrics(rollout: Rollout, report: JudgeReport) -> dict[str, float]:
    """Means of raw components per task, their counts, and mean and spread of the total that credit consumes."""
    metrics: dict[str, float] = {}
    for (task, component), (scored, inapplicable, failed) in report.counts.items():
        if scored:
            rows = (rollout.task == rollout.task_names.index(task)) & (rollout.status[component] == SCORED)
            value = rollout.rewards[component]
            value = value if value.ndim == 1 else torch.where(rollout.mask, value, 0).sum(1)
            metrics[f"reward/{task}/{component}"] = float(value[rows].mean())
        metrics[f"count/{task}/{component}/scored"] = scored
        if inapplicable:
            metrics[f"count/{task}/{component}/not_applicable"] = inapplicable
        if failed:
            metrics[f"count/{task}/{component}/failed"] = failed
    if rollout.reward is not None:
        total = rollout.reward if rollout.reward.ndim == 1 else (rollout.reward * rollout.mask).sum(1)
        judged = total[rollout.loss_mask.any(1)]
        if len(judged):
            std, mean = torch.std_mean(judged, correction=0)
            metrics["reward/total"], metrics["reward/total_std"] = float(mean), float(std)
    return metrics


def credit_metrics(judged: Rollout, credited: Rollout) -> dict[str, float]:
    """Over the steps that are learned from: mean and mean size of the advantages, and means of the columns `[B, T]`
    that the credit added, as `credit/<column>`.
    """
    metrics, learned = {}, credited.loss_mask
    if credited.advantages is not None and credited.advantages.ndim == 2:
        advantages = credited.advantages[learned]
        metrics = {"advantage/mean": float(mean_of(advantages)), "advantage/size": float(mean_of(advantages.abs()))}
    known = set(judged.step_columns.keys())
    for name, column in credited.step_columns.items():
        if name not in known and isinstance(column, Tensor) and column.shape == learned.shape:
            metrics[f"credit/{name}"] = float(mean_of(column[learned]))
    return metrics
