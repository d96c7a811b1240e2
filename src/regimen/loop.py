"""The loop: collect, judge, credit, learn, adapt. Nothing else in the library owns a training loop."""

from __future__ import annotations

import dataclasses
import platform
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import numpy as np
import torch

from regimen.cast import Cast
from regimen.controllers.base import Moment, Situation
from regimen.health import HealthMonitor
from regimen.learn import Learner
from regimen.regimen import Regimen, Stage
from regimen.rewards.base import Scene
from regimen.rewards.judge import JudgeReport, judge
from regimen.rollout import Rollout
from regimen.runs import RunError, RunFolder, describe, read_metrics
from regimen.storage import random_state, set_random_state

FAILURE_WINDOW = 20


@dataclass
class Counters:
    """What a run has spent so far.

    Attributes:
        stage: index of the stage at work; step: iterations of it that are complete.
        iterations: iterations over all stages.
        samples: generated samples; rows: samples read from data; gradient_steps: optimiser steps taken.
        skipped: gradient steps not taken because they were not finite.
        seconds: time in iterations, evaluations and checkpoints left out.
    """

    stage: int = 0
    step: int = 0
    iterations: int = 0
    samples: int = 0
    rows: int = 0
    gradient_steps: int = 0
    skipped: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Event:
    """Something a listener may show: a finished iteration, an evaluation, a warning, a stage's start."""

    kind: Literal["stage", "step", "evaluation", "warning"]
    stage: str
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


Listener = Callable[[Event], None]


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its cast, what it spent, its evaluations in order, its warnings with counts."""

    cast: Cast
    counters: Counters
    evaluations: list[dict[str, Any]]
    warnings: dict[str, int]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; it finished its step and, if it has a folder, saved a checkpoint."""


class StageRun:
    """One stage at work: everything that an iteration needs and a checkpoint must hold."""

    def __init__(self, regimen: Regimen, stage: Stage) -> None:
        self.stage, self.cast = stage, regimen.cast
        self.board = stage.board(regimen.cast, regimen.knobs)
        self.memory = stage.memory()
        self.health = HealthMonitor()
        self.learners: list[Learner] = []
        self._owed = {task.name: 0.0 for task in stage.tasks}
        self._failures: deque[tuple[int, int]] = deque(maxlen=FAILURE_WINDOW)
        self.skipped_in_row = 0

    def start(self, fresh: bool) -> None:
        """Apply rules and prepare steps (when fresh), then make the optimisers."""
        if fresh:
            for rule in self.stage.rules:
                rule.start(self.cast)
            for prepare in self.stage.prepare:
                prepare(self.cast, self.stage.tasks, self.memory)
        self.cast.train_only({member for update in self.stage.updates for member in update.members})
        self.learners = [Learner(update, self.cast) for update in self.stage.updates]

    def iterate(self, step: int, counters: Counters, rng: torch.Generator) -> dict[str, float]:
        """One turn of the five verbs; returns its metrics."""
        metrics: dict[str, float] = {}
        self._adapt("before_collect", step, metrics)
        in_force = {f"knob/{name}": value for name, value in self.board.items()}
        rollout = self._collect(rng, counters)
        rollout = self._judge(rollout, metrics)
        self._adapt("after_judge", step, metrics)
        if self.stage.credit is not None:
            rollout = self.stage.credit(rollout, self.board)
        self.memory.add(rollout)
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
                counters.samples += size if task.generates else 0
                counters.rows += 0 if task.generates else size
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
            metrics.update(learned.metrics)
            skipped, taken = skipped + learned.skipped, taken + learned.gradient_steps
            first = learned.first_ratio_deviation if first is None else first
        counters.gradient_steps += taken
        counters.skipped += skipped
        self.skipped_in_row = self.skipped_in_row + skipped if skipped and not taken else 0
        expected = tuple(t.name for t in self.stage.tasks if self._share(t.name) > 0)
        metrics.update(
            self.health.observe(
                rollout, metrics, expected_tasks=expected, first_ratio_deviation=first, skipped=skipped
            )
        )

    def _share(self, task: str) -> float:
        return self.board[f"mixture/{task}"] if len(self.stage.tasks) > 1 else 1.0

    def _adapt(self, moment: Moment, step: int, metrics: Mapping[str, float]) -> None:
        situation = Situation(step, self.stage.steps, metrics, self.board)
        for controller in self.stage.controllers:
            if controller.moment == moment:
                for name, value in controller(situation).items():
                    self.board.set(name, value, by=type(controller).__name__)

    def state_dict(self) -> dict[str, Any]:
        """Everything but the cast."""
        return {
            "knobs": self.board.state_dict(),
            "memory": self.memory.state_dict(),
            "learners": [learner.state_dict() for learner in self.learners],
            "controllers": [controller.state_dict() for controller in self.stage.controllers],
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
        for parts, saved in (
            (self.learners, state["learners"]),
            (self.stage.controllers, state["controllers"]),
            (self.stage.tasks, state["tasks"]),
        ):
            for part, entry in zip(parts, saved, strict=True):
                part.load_state_dict(entry)
        if self.stage.reward is not None:
            self.stage.reward.load_state_dict(state["reward"])
        self.health.load_state_dict(state["health"])
        self._owed.update(state["owed"])
        self._failures.extend(tuple(pair) for pair in state["failures"])
        self.skipped_in_row = int(state["skipped_in_row"])


class Trainer:
    """A regimen at work. Use `train`."""

    def __init__(
        self,
        regimen: Regimen,
        seed: int,
        out: Path | str | None,
        resume: bool,
        listener: Listener | None,
        checkpoint_every: int | None,
        checkpoint_share: float,
    ) -> None:
        self.regimen, self.seed = regimen, seed
        self.listener: Listener = listener or (lambda event: None)
        self.counters = Counters()
        self.evaluations: list[dict[str, Any]] = []
        self.warnings: dict[str, int] = {}
        self._every, self._share = checkpoint_every, checkpoint_share
        self._cost, self._last = 0.0, time.perf_counter()
        self._stop = False
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        self.rng = torch.Generator(regimen.cast.device).manual_seed(seed)
        self.folder = None if out is None else RunFolder(out, configuration(regimen, seed), resume)
        self._restored = self.folder.restore() if self.folder is not None and resume else None

    def run(self) -> Outcome:
        """All stages, from the checkpoint on if there was one."""
        with self._stoppable():
            if self._restored is not None:
                self._restore_counters(self._restored)
            else:
                self._evaluate("start")
            while self.counters.stage < len(self.regimen.stages):
                self._run_stage(self.regimen.stages[self.counters.stage])
                self.counters.stage, self.counters.step = self.counters.stage + 1, 0
        if self.folder is not None:
            self._checkpoint(None)
            self.folder.close()
        return Outcome(self.regimen.cast, self.counters, self.evaluations, self.warnings)

    def _run_stage(self, stage: Stage) -> None:
        self.listener(Event("stage", stage.name, self.counters.step, stage.steps))
        run = StageRun(self.regimen, stage)
        if self._restored is not None:
            self._restore(run)
        else:
            run.start(fresh=True)
        ended = False
        while self.counters.step < stage.steps and not ended:
            ended = self._step(run)
        self._finish_stage(run)

    def _step(self, run: StageRun) -> bool:
        """One iteration with its bookkeeping; whether the stage's stopping rule is met."""
        stage, started = run.stage, time.perf_counter()
        metrics = run.iterate(self.counters.step, self.counters, self.rng)
        elapsed = time.perf_counter() - started
        self.counters.step, self.counters.iterations = self.counters.step + 1, self.counters.iterations + 1
        self.counters.seconds += elapsed
        self._log("step", stage.name, metrics, {"seconds": elapsed})
        self.listener(Event("step", stage.name, self.counters.step, stage.steps, metrics))
        for text in run.health.fresh:
            self.listener(Event("warning", stage.name, self.counters.step, stage.steps, text=text))
        if run.skipped_in_row >= stage.max_skipped:
            self._give_up_or_restore(run)
        every = stage.evaluate_every
        if every and self.counters.step % every == 0 and self.counters.step < stage.steps:
            self._evaluate(stage.name)
        if self._stop or self._due():
            self._checkpoint(run)
        if self._stop:
            raise Interrupted
        return stage.stop is not None and stage.stop(metrics)

    def _finish_stage(self, run: StageRun) -> None:
        for text, count in run.health.warnings.items():
            self.warnings[text] = self.warnings.get(text, 0) + count
        self._evaluate(run.stage.name)
        if self.folder is not None:
            self.folder.save_cast(self.regimen.cast.state_dict(), run.stage.name)

    def _evaluate(self, stage: str) -> None:
        """Every task's own measure, from the same random stream each time, so that it does not move training."""
        cast = self.regimen.cast
        rng = torch.Generator(cast.device).manual_seed(1_000_003 * (self.seed + 1))
        index = min(self.counters.stage, len(self.regimen.stages) - 1)
        knobs = self.regimen.stages[index].board(cast, self.regimen.knobs).for_evaluation()
        metrics: dict[str, float] = {}
        for task in self.regimen.evaluated():
            evaluation = task.evaluate(cast, knobs, rng)
            metrics.update({f"{task.name}/{name}": float(value) for name, value in evaluation.metrics.items()})
            if self.folder is not None:
                label = f"{self.counters.iterations:06d}-{stage}-{task.name}"
                self.folder.save_samples(label, evaluation.samples)
        if not metrics:
            return
        self.evaluations.append(self._log("evaluation", stage, metrics))
        self.listener(Event("evaluation", stage, self.counters.step, self.counters.step, metrics))

    def _log(
        self, kind: str, stage: str, metrics: Mapping[str, float], time_spent: Mapping[str, float] | None = None
    ) -> dict[str, Any]:
        spent = {k: v for k, v in dataclasses.asdict(self.counters).items() if k not in ("stage", "step", "seconds")}
        record: dict[str, Any] = {"kind": kind, "stage": stage, "step": self.counters.step, **spent}
        record |= {"metrics": dict(metrics), "time": dict(time_spent or {})}
        if self.folder is not None:
            self.folder.log(record, self.counters.iterations)
        return record

    def _due(self) -> bool:
        """Whether a checkpoint is due: by count, or so that saving takes no more than its share of the time."""
        if self.folder is None:
            return False
        if self._every is not None:
            return self.counters.iterations % self._every == 0
        return time.perf_counter() - self._last >= self._cost / self._share

    def _checkpoint(self, run: StageRun | None) -> None:
        if self.folder is None:
            return
        started = time.perf_counter()
        state = {
            "counters": dataclasses.asdict(self.counters),
            "cast": self.regimen.cast.state_dict(),
            "stage": None if run is None else run.state_dict(),
            "rng": self.rng.get_state(),
            "random": random_state(),
            "warnings": self.warnings,
        }
        self.folder.checkpoint(state, self.counters.iterations)
        self._last = time.perf_counter()
        self._cost = self._last - started

    def _restore_counters(self, state: Mapping[str, Any]) -> None:
        self.counters = Counters(**state["counters"])
        self.warnings = dict(state["warnings"])
        if self.folder is not None:
            records = read_metrics(self.folder.path / "metrics.jsonl")
            self.evaluations = [record for record in records if record["kind"] == "evaluation"]
        if self.counters.stage >= len(self.regimen.stages):
            self.regimen.cast.load_state_dict(state["cast"])

    def _restore(self, run: StageRun) -> None:
        state, self._restored = self._restored, None
        assert state is not None
        self.regimen.cast.load_state_dict(state["cast"])
        if state["stage"] is None:
            run.start(fresh=True)
        else:
            run.start(fresh=False)
            run.load_state_dict(state["stage"])
        self.rng.set_state(state["rng"])
        set_random_state(state["random"])

    def _give_up_or_restore(self, run: StageRun) -> None:
        stage = run.stage
        trouble = (
            f"stage '{stage.name}': {run.skipped_in_row} gradient steps in a row were not finite at iteration "
            f"{self.counters.step}; the weights are those of before. Lower the learning rate or look for NaN in the data"
        )
        state = self.folder.restore() if self.folder is not None and stage.on_nonfinite == "restore" else None
        if state is None or state["stage"] is None:
            raise RunError(trouble)
        self.counters = Counters(**{**state["counters"], "skipped": self.counters.skipped})
        self.regimen.cast.load_state_dict(state["cast"])
        run.load_state_dict(state["stage"])
        run.skipped_in_row = 0
        self.rng.manual_seed(self.seed + 7919 * self.counters.skipped)
        self.listener(Event("warning", stage.name, self.counters.step, stage.steps, text=f"{trouble}; restored"))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; the second at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: FrameType | None) -> None:
            if self._stop:
                raise KeyboardInterrupt
            self._stop = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def train(
    regimen: Regimen,
    *,
    seed: int = 0,
    out: Path | str | None = None,
    resume: bool = False,
    listener: Listener | None = None,
    checkpoint_every: int | None = None,
    checkpoint_share: float = 0.05,
) -> Outcome:
    """Run a regimen from its first stage to its last.

    Args:
        regimen: the cast and the stages. The cast is trained in place.
        seed: of all that the run draws; the cast's initial weights are yours.
        out: run folder; nothing is written if `None`.
        resume: continue the run in `out` from its newest readable checkpoint, to the same numbers as an
            uninterrupted run, bit for bit on CPU; a folder without one starts from the beginning.
        listener: called with every `Event`.
        checkpoint_every: iterations between checkpoints; by default as often as saving takes no more than
            `checkpoint_share` of the time.
        checkpoint_share: see above.

    Returns:
        The trained cast, counters, evaluations and warnings.

    Raises:
        RunError: the run cannot start or must stop; the last checkpoint stands.
        Interrupted: it was asked to stop (Ctrl-C, SIGTERM) and has saved a checkpoint.
        StorageError: the disk refused; what was saved before stands.
    """
    return Trainer(regimen, seed, out, resume, listener, checkpoint_every, checkpoint_share).run()


def configuration(regimen: Regimen, seed: int) -> dict[str, Any]:
    """Everything needed to repeat a run, as JSON."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    cast = {name: describe(member) for name, member in regimen.cast.items()}
    stages = [describe(stage) for stage in regimen.stages]
    return {"seed": seed, "versions": versions, "cast": cast, "knobs": dict(regimen.knobs), "stages": stages}


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
            rows = (rollout.task == rollout.task_names.index(task)) & (rollout.status[component] == 0)
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
            metrics["reward/total"] = float(judged.mean())
            metrics["reward/total_std"] = float(judged.std(correction=0))
    return metrics

