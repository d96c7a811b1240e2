"""The loop: collect, judge, credit, learn, adapt. Nothing else in the library owns a training loop."""

from __future__ import annotations

import dataclasses
import math
import platform
import random
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from regimen.cast import Cast
from regimen.iteration import Counters, StageRun
from regimen.progress import Event as Event
from regimen.progress import Listener as Listener
from regimen.progress import ProgressBar
from regimen.regimen import Regimen, Stage
from regimen.runs import RunError, RunFolder, describe, read_metrics
from regimen.storage import random_state, set_random_state


@dataclass(frozen=True)
class Outcome:
    """What a run leaves: its cast, what it spent, its evaluations in order, its warnings with counts."""

    cast: Cast
    counters: Counters
    evaluations: list[dict[str, Any]]
    warnings: dict[str, int]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; it finished its step and, if it has a folder, saved a checkpoint."""


class Trainer:
    """A regimen at work. Use `train`."""

    def __init__(
        self,
        regimen: Regimen,
        seed: int,
        out: Path | str | None,
        resume: bool,
        listener: Listener,
        checkpoint_every: int | None,
        checkpoint_share: float,
    ) -> None:
        self.regimen, self.seed = regimen, seed
        self.listener = listener
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
        self._restored = self.folder.restore(self._warn) if self.folder is not None and resume else None

    def run(self) -> Outcome:
        """All stages, from the checkpoint on if there was one."""
        with self._stoppable(), nullcontext() if self.folder is None else closing(self.folder):
            if self._restored is not None:
                self._restore_counters(self._restored)
            else:
                self._evaluate("start")
            while self.counters.stage < len(self.regimen.stages):
                self._run_stage(self.regimen.stages[self.counters.stage])
                self.counters.stage, self.counters.step = self.counters.stage + 1, 0
            self._checkpoint(None)
        return Outcome(self.regimen.cast, self.counters, self.evaluations, self.warnings)

    def _run_stage(self, stage: Stage) -> None:
        self.listener(Event("stage", stage.name, self.counters.step, stage.steps))
        run = StageRun(self.regimen, stage)
        if self._restored is not None:
            self._restore(run)
        else:
            self._start(run)
        ended = False
        while self.counters.step < stage.steps and not ended:
            ended = self._step(run)
        self._finish_stage(run)

    def _start(self, run: StageRun) -> None:
        """A fresh start of a stage, whose prepare steps may be most of its work."""
        started = time.perf_counter()
        run.start(fresh=True)
        self.counters.seconds += time.perf_counter() - started

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
        knobs = self.regimen.evaluation_knobs(self.regimen.stages[index])
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
        self,
        kind: str,
        stage: str,
        metrics: Mapping[str, float],
        time_spent: Mapping[str, float] | None = None,
    ) -> dict[str, Any]:
        spent = {k: v for k, v in vars(self.counters).items() if k not in ("stage", "step", "seconds")}
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
            self._start(run)
        else:
            run.start(fresh=False)
            run.load_state_dict(state["stage"])
        self.rng.set_state(state["rng"])
        set_random_state(state["random"])

    def _give_up_or_restore(self, run: StageRun) -> None:
        stage = run.stage
        trouble = (
            f"stage '{stage.name}': {run.skipped_in_row} gradient steps in a row were not finite at iteration "
            f"{self.counters.step}; the weights are those of before. "
            "Lower the learning rate or look for NaN in the data"
        )
        state = self.folder.restore(self._warn) if self.folder and stage.on_nonfinite == "restore" else None
        if state is None or state["stage"] is None:
            raise RunError(trouble)
        self.counters = Counters(**{**state["counters"], "skipped": self.counters.skipped})
        self.regimen.cast.load_state_dict(state["cast"])
        run.load_state_dict(state["stage"])
        run.skipped_in_row = 0
        self.rng.manual_seed(self.seed + 7919 * self.counters.skipped)
        self.listener(Event("warning", stage.name, self.counters.step, stage.steps, text=f"{trouble}; restored"))

    def _warn(self, text: str) -> None:
        """A warning about the run's folder: nothing else would tell it where the listener is not shown."""
        warnings.warn(text, stacklevel=3)
        self.listener(Event("warning", "resume", self.counters.step, self.counters.step, text=text))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM ends the run after its step, with a checkpoint; a later one at once.

        What comes within a second is the same request: a process group, its parent and a terminal may all pass it on.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        asked = math.inf

        def ask(number: int, _frame: FrameType | None) -> None:
            nonlocal asked
            if time.monotonic() > asked + 1:
                raise KeyboardInterrupt
            self._stop, asked = True, min(asked, time.monotonic())

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
        listener: called with every `Event`; by default a progress bar if standard error is a terminal.
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
    with nullcontext(listener) if listener else ProgressBar() as shown:
        return Trainer(regimen, seed, out, resume, shown, checkpoint_every, checkpoint_share).run()


def configuration(regimen: Regimen, seed: int) -> dict[str, Any]:
    """Everything needed to repeat a run, as JSON."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    cast = {name: describe(member) for name, member in regimen.cast.items()}
    stages = [describe(stage) for stage in regimen.stages]
    return {"seed": seed, "versions": versions, "cast": cast, "knobs": dict(regimen.knobs), "stages": stages}
