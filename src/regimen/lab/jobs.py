"""A job is one arm with one seed. A worker trains it in a folder of its own and leaves its result there."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from regimen.lab.cache import CacheEntry, content_key
from regimen.lab.crew import Line, Stopped
from regimen.lab.experiment import SPENT, Arm, ArmResult, Paper, Settings
from regimen.lab.settings import build
from regimen.loop import Interrupted, train
from regimen.progress import Event
from regimen.regimen import Regimen
from regimen.runs import read_metrics
from regimen.storage import StorageError, load_tree, write_text

RESULT, OUTPUT = "result.json", "output.txt"
_PAUSE_S = 0.2


@dataclass(frozen=True)
class Job:
    """What a worker needs to train one arm with one seed.

    Attributes:
        load: gives the paper; a module-level function (or a partial of one), so that a new process can import it.
        arm, seed, settings, knobs: what is trained.
        out: the experiment's folder.
        resume: whether to continue what is in the job's folder.
        cache: where the trained folders of cached arms are kept.
    """

    load: Callable[[], Paper]
    arm: str
    seed: int
    settings: Settings
    knobs: Mapping[str, float]
    out: Path
    resume: bool
    cache: Path

    @property
    def folder(self) -> Path:
        """Where it is trained."""
        return run_folder(self.out, self.arm, self.seed)


@dataclass(frozen=True)
class Note:
    """What a job tells while it runs.

    Attributes:
        kind: `"begin"`, then `"step"` (a few per second), `"evaluation"`, `"warning"`.
        stage, step, total: where in the stage at work.
        done: share of the whole job that is done.
        reward: mean total reward of the iteration, if it has one.
        metrics: the paper's metrics, at an evaluation.
        text: a warning's.
    """

    kind: Literal["begin", "step", "evaluation", "warning"]
    stage: str = ""
    step: int = 0
    total: int = 0
    done: float = 0.0
    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    text: str = ""


@dataclass(frozen=True)
class JobResult:
    """What a finished job did: its stages, its evaluations, what it spent itself, health warnings with counts.

    `gradients` are the largest norms, by update. If it was `cached`, an earlier experiment spent that; it is charged
    all the same.
    """

    stages: list[str]
    evaluations: list[dict[str, Any]]
    samples: int
    rows: int
    gradient_steps: int
    seconds: float
    warnings: dict[str, int]
    cached: bool = False
    drawn: int = 0
    gradients: dict[str, float] = field(default_factory=dict)


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of one arm and seed within an experiment's."""
    return out / arm / f"seed{seed}"


def read_result(folder: Path) -> JobResult | None:
    """What a finished job left in its folder; `None` if it has not finished."""
    path = folder / RESULT
    return JobResult(**json.loads(path.read_text())) if path.exists() else None


def charged(arm: Arm, paper: Paper, results: Mapping[str, JobResult]) -> ArmResult:
    """An arm's result, charged with what the arms it starts from have spent; `results` are one seed's, by arm."""
    own = results[arm.name]
    spent = [own]
    while arm.start is not None:
        arm = paper.arm(arm.start)
        spent.append(results[arm.name])
    return ArmResult(
        own.evaluations,
        **{what: sum(getattr(part, what) for part in spent) for what in SPENT},
        warnings=own.warnings,
        gradients=own.gradients,
    )


def train_job(job: Job, line: Line) -> None:
    """Train a job in this process; `result.json` in its folder is the sign that it is done."""
    job.folder.mkdir(parents=True, exist_ok=True)
    with _output_to(job.folder / OUTPUT):
        if line.told_to_stop():
            raise Stopped
        line.tell(Note("begin"))
        paper = job.load()
        entry = _cache_entry(job, paper)
        result = None if entry is None else _recall(entry, job.folder, line)
        if result is None:
            result = _train(job, paper, line)
            if entry is not None and result.gradient_steps:
                _keep(entry, job.folder, result, line)
    write_text(job.folder / RESULT, json.dumps(vars(result), indent=1))


def _train(job: Job, paper: Paper, line: Line) -> JobResult:
    regimen = _start(job, paper)
    listener = _Listener(line, regimen, list(paper.metrics))
    try:
        outcome = train(regimen, seed=job.seed, out=job.folder, resume=job.resume, listener=listener)
    except Interrupted:
        raise Stopped from None
    spent = outcome.counters
    return JobResult(
        stages=[stage.name for stage in regimen.stages],
        evaluations=outcome.evaluations,
        **{what: getattr(spent, what) for what in SPENT},
        warnings=outcome.warnings,
        gradients=_largest_gradients(job.folder),
    )


def _largest_gradients(folder: Path) -> dict[str, float]:
    """By update, over all steps of a run."""
    largest: dict[str, float] = {}
    for record in read_metrics(folder / "metrics.jsonl"):
        for name, value in record["metrics"].items():
            update, _, metric = name.rpartition("/")
            if metric == "grad_norm":
                largest[update] = max(value, largest.get(update, 0.0))
    return largest


def _cache_entry(job: Job, paper: Paper) -> CacheEntry | None:
    """Where a cached arm's training is kept; `None` for an arm that is not."""
    arm = paper.arm(job.arm)
    if not arm.cached:
        return None
    settings = {k: v for k, v in dataclasses.asdict(job.settings).items() if k not in arm.ignores}
    configuration = {"paper": paper.slug, "arm": arm.name, "seed": job.seed, "settings": settings, "knobs": job.knobs}
    name = f"{paper.slug}-{arm.name}-seed{job.seed}-{content_key(arm.build, configuration)}"
    return CacheEntry(job.cache / name)


def _recall(entry: CacheEntry, folder: Path, line: Line) -> JobResult | None:
    """What an earlier experiment kept; a damaged entry is removed, with a warning."""
    try:
        kept = entry.recall(folder)
        return None if kept is None else JobResult(**{**kept, "cached": True})
    except (StorageError, TypeError) as error:
        line.tell(Note("warning", text=f"{error}; it is trained again"))
        entry.drop()
        return None


def _keep(entry: CacheEntry, folder: Path, result: JobResult, line: Line) -> None:
    try:
        entry.keep(folder, vars(result))
    except StorageError as error:
        line.tell(Note("warning", text=str(error)))


def _start(job: Job, paper: Paper) -> Regimen:
    """The arm's regimen, with the cast that it starts from."""
    # A worker does one job after the other: what it did before must not show in what it draws now.
    torch.manual_seed(job.seed)
    np.random.seed(job.seed % 2**32)
    random.seed(job.seed)
    arm = paper.arm(job.arm)
    regimen = build(arm, job.seed, job.settings, job.knobs)
    if arm.start is not None:
        folder = run_folder(job.out, arm.start, job.seed)
        if (before := read_result(folder)) is None:
            raise FileNotFoundError(f"{folder} has no {RESULT}; arm '{arm.name}' starts from what is trained there")
        regimen.cast.load_state_dict(load_tree(folder / f"cast-{before.stages[-1]}.safetensors"))
    return regimen


class _Listener:
    """Passes on what the loop tells, not too often, and asks the loop to stop when the parent wants it."""

    def __init__(self, line: Line, regimen: Regimen, metrics: list[str]) -> None:
        self._line, self._metrics = line, metrics
        self._total = max(sum(stage.steps for stage in regimen.stages), 1)
        self._before, sum_of = {}, 0
        for stage in regimen.stages:
            self._before[stage.name] = sum_of
            sum_of += stage.steps
        self._last, self._asked = 0.0, False

    def __call__(self, event: Event) -> None:
        if not self._asked and self._line.told_to_stop():
            self._asked = True
            signal.raise_signal(
                signal.SIGTERM
            )  # The loop finishes its step, saves a checkpoint and raises Interrupted.
        now = time.monotonic()
        if event.kind == "step" and now - self._last < _PAUSE_S and event.step < event.total:
            return
        self._last = now
        kind = "step" if event.kind == "stage" else event.kind
        done = (self._before.get(event.stage, 0) + event.step) / self._total
        shown = {name: event.metrics[name] for name in self._metrics if name in event.metrics}
        reward = event.metrics.get("reward/total")
        self._line.tell(Note(kind, event.stage, event.step, event.total, done, reward, shown, event.text[:500]))


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """What this process and its libraries print goes to a file, with the traceback of what is raised."""
    kept = [os.dup(1), os.dup(2)]
    with path.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        yield
    except Exception:
        with suppress(OSError):
            traceback.print_exc()
        raise
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError):
                stream.flush()
        for number, copy in enumerate(kept, 1):
            os.dup2(copy, number)
            os.close(copy)
