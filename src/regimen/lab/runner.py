"""Runs an experiment: arms and seeds as jobs in parallel processes, each after the arm that it starts from."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from regimen.lab.cache import cache_folder
from regimen.lab.crew import Crew, Report
from regimen.lab.experiment import ExperimentError, Paper, Settings
from regimen.lab.jobs import OUTPUT, RESULT, Job, Note, read_result, run_folder, train_job
from regimen.lab.results import FILE, Failure, Findings, read_results, versions
from regimen.lab.settings import override
from regimen.storage import StorageError

MAX_DEATHS = 3
LOCK = ".lock"
_TICK_S = 0.2

Key = tuple[str, int]
"""A job: arm and seed."""


class ExperimentInterrupted(KeyboardInterrupt):
    """The experiment was asked to stop; its jobs have saved checkpoints and it can be resumed."""


@dataclass(frozen=True)
class Progress:
    """What a listener is told.

    Attributes:
        kind: `"plan"` (once, before anything runs), `"note"` (a job tells something), `"done"`, `"failed"`,
            `"died"` (a job's process did; the job goes on), `"stopping"`.
        arm, seed: which job.
        note: what it tells.
        metrics: the paper's metrics at the end of a job that is done.
        text: a reason, or where what is done comes from if it was not trained.
        finished, jobs: how many there are.
    """

    kind: Literal["plan", "note", "done", "failed", "died", "stopping"]
    arm: str = ""
    seed: int = 0
    note: Note | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    text: str = ""
    finished: int = 0
    jobs: int = 0


Listener = Callable[[Progress], None]


@dataclass(frozen=True)
class Plan:
    """An experiment as it was asked for.

    Attributes:
        load: gives the paper; a module-level function or a partial of one, so that a new process can import it.
        out: the experiment's folder.
        scale: one of the paper's.
        seeds: of the runs; what is compared is compared within a seed. By default 0 at scale "quick", else 0 to 4.
        arms: names; by default all but the extended ones. The arms that they start from are added.
        overrides: texts by name of a setting or a knob.
        resume: continue what is in `out`, with the same settings; seeds and arms may be added, by default none are.
        workers: processes; by default one per CPU, or one if the settings have a `device` that is not "cpu".
        cache: where the trained folders of cached arms are kept.
    """

    load: Callable[[], Paper]
    out: Path
    scale: str = "default"
    seeds: Sequence[int] | None = None
    arms: Sequence[str] | None = None
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)
    resume: bool = False
    workers: int | None = None
    cache: Path = dataclasses.field(default_factory=cache_folder)


def run_experiment(plan: Plan, listener: Listener = lambda progress: None) -> dict[str, Any]:
    """Train what the plan asks for and return the content of `results.json`, which is rewritten after every job.

    A job that fails, or whose process dies `MAX_DEATHS` times, is listed under `failures` with those that would start
    from it; the others go on.

    Raises:
        ExperimentError: the plan does not fit the paper, or the folder holds another experiment, or another process
            is at work there.
        ExperimentInterrupted: Ctrl-C or SIGTERM; go on with `resume`.
        StorageError: `results.json` cannot be written.
    """
    experiment = _Experiment(plan, listener)
    with _alone(plan.out):
        return experiment.run()


class _Experiment:
    """A plan at work."""

    def __init__(self, plan: Plan, listener: Listener) -> None:
        self.plan, self.listener = plan, listener
        self.findings, self.knobs = _opened(plan)
        self.started = time.monotonic() - self.findings.seconds
        keys = [(arm, seed) for seed in self.findings.seeds for arm in self.findings.arms]
        self.jobs = len(keys)
        self.waiting: list[Key] = [key for key in keys if not self._recall(key)]
        self.deaths: dict[Key, int] = {}
        self.stopping = False

    def run(self) -> dict[str, Any]:
        """All jobs that are waiting."""
        self._write()
        self._tell("plan")
        size = max(min(self.findings.workers, len(self.waiting)), 1)
        with self._stoppable(), Crew(size, train_job) as crew:
            while (self.waiting or crew.busy) and not self.stopping:
                while crew.free and (key := self._ready()):
                    crew.submit(key, self._job(key))
                self._hear(crew)
            if self.stopping:
                self._tell("stopping", text=f"{crew.busy} jobs finish their step and save a checkpoint")
                crew.stop()
                while crew.busy:
                    self._hear(crew)
                raise ExperimentInterrupted
        return self._write()

    def _job(self, key: Key) -> Job:
        arm, seed = key
        resume = self.plan.resume or key in self.deaths
        plan = self.plan
        return Job(plan.load, arm, seed, self.findings.settings, self.knobs, plan.out, resume, plan.cache)

    def _ready(self) -> Key | None:
        """The first waiting job whose start is trained; those whose start has failed are given up."""
        failed = {(failure.arm, failure.seed) for failure in self.findings.failures}
        for key in list(self.waiting):
            name, seed = key
            start = self.findings.paper.arm(name).start
            if (start, seed) in failed:
                self.waiting.remove(key)
                failed.add(key)
                self._fail(key, f"not trained, for '{start}', from which it starts, has failed")
            elif start is None or start in self.findings.jobs.get(seed, {}):
                self.waiting.remove(key)
                return key
        return None

    def _hear(self, crew: Crew) -> None:
        for report in crew.wait(_TICK_S):
            self._heed(report)

    def _heed(self, report: Report) -> None:
        key = report.key
        assert isinstance(key, tuple)
        if report.kind == "event":
            self._tell("note", key, note=report.content)
        elif report.kind == "done":
            self._recall(key)
            self._write()
            result = self.findings.jobs[key[1]][key[0]]
            final = result.evaluations[-1]["metrics"] if result.evaluations else {}
            shown = {m: final[m] for m in self.findings.paper.metrics if m in final}
            text = f"kept from an earlier run, which took {result.seconds:.0f} s" if result.cached else ""
            self._tell("done", key, metrics=shown, text=text)
        elif report.kind == "failed":
            self._fail(key, f"{report.content} (more in {run_folder(self.plan.out, *key) / OUTPUT})")
        elif not self.stopping:
            self._mourn(key, report.content if report.kind == "died" else "terminated from outside")

    def _mourn(self, key: Key, cause: str) -> None:
        """A job's process has died: the job goes on from its checkpoint, unless this has happened too often."""
        self.deaths[key] = self.deaths.get(key, 0) + 1
        if self.deaths[key] == MAX_DEATHS:
            advice = "run with fewer workers, or give it more memory, and resume"
            self._fail(key, f"its process died {MAX_DEATHS} times (the last was {cause}); {advice}")
        else:
            self.waiting.insert(0, key)
            self._tell("died", key, text=f"{cause} (time {self.deaths[key]} of {MAX_DEATHS})")

    def _fail(self, key: Key, reason: str) -> None:
        self.findings.failures.append(Failure(*key, reason))
        self._write()
        self._tell("failed", key, text=reason)

    def _recall(self, key: Key) -> bool:
        """Take a finished job's result from its folder, if it is there."""
        name, seed = key
        result = read_result(run_folder(self.plan.out, name, seed))
        if result is not None:
            self.findings.jobs.setdefault(seed, {})[name] = result
        return result is not None

    def _write(self) -> dict[str, Any]:
        self.findings.seconds = time.monotonic() - self.started
        return self.findings.write(self.plan.out)

    def _tell(self, kind: Any, key: Key = ("", 0), **details: Any) -> None:
        finished = sum(len(jobs) for jobs in self.findings.jobs.values()) + len(self.findings.failures)
        self.listener(Progress(kind, *key, finished=finished, jobs=self.jobs, **details))

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """The first Ctrl-C or SIGTERM lets the jobs save a checkpoint; the second ends them at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def ask(number: int, _frame: FrameType | None) -> None:
            if self.stopping:
                raise ExperimentInterrupted
            self.stopping = True

        previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Two processes in one folder would overwrite each other's runs; the system lifts the lock when ours ends."""
    try:
        file = (out / LOCK).open("w")
    except OSError as error:
        raise StorageError(f"{out} cannot be written: {error}; free some room or choose another folder") from error
    with file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ExperimentError(f"another process is at work in {out}; wait for it or stop it first") from None
        except (ImportError, OSError):
            pass  # Windows and some network disks have no such lock.
        yield


def _opened(plan: Plan) -> tuple[Findings, dict[str, float]]:
    """Make the folder, or check that it holds the same experiment; what is to be found, and the knobs to set."""
    paper = plan.load()
    before = _before(plan)
    arms, seeds = plan.arms, plan.seeds or ([0] if plan.scale == "quick" else [0, 1, 2, 3, 4])
    if before:
        arms = [*(plan.arms or ()), *before["arms"]]
        seeds = sorted({*(plan.seeds or ()), *before["seeds"]})
    selected = paper.selected(arms, plan.scale)
    settings, knobs = override(paper, plan.scale, plan.overrides, selected, seeds[0])
    changed = _changed(settings, paper.settings(plan.scale)) | knobs
    if before:
        _check_same(plan, before, {"paper": paper.slug, **dataclasses.asdict(settings), **changed})
    try:
        plan.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExperimentError(f"{plan.out} cannot be written: {error}; choose another folder") from error
    per_cpu = (os.cpu_count() or 1) if str(getattr(settings, "device", "cpu")) == "cpu" else 1
    workers, seconds = plan.workers or per_cpu, before["wall_clock_seconds"] if before else 0.0
    names = [arm.name for arm in selected]
    findings = Findings(paper, plan.scale, settings, changed, names, seeds, workers=workers, seconds=seconds)
    return findings, knobs


def _before(plan: Plan) -> dict[str, Any] | None:
    """What `results.json` holds, if a run is to be continued."""
    if not (plan.out / FILE).exists():
        if found := next(plan.out.glob(f"*/seed*/{RESULT}"), None):
            raise ExperimentError(
                f"{plan.out} has no {FILE}, so that nobody can say with which settings {found.parent} was trained; "
                "choose another --out"
            )
        return None
    if not plan.resume:
        raise ExperimentError(
            f"{plan.out} already holds an experiment; continue it with --resume, or choose another --out"
        )
    before = read_results(plan.out)
    if before["scale"] != plan.scale:
        raise _other(plan, "scale", before["scale"], plan.scale)
    return before


def _check_same(plan: Plan, before: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    now = {**settings, **versions()}
    then = {"paper": before["paper"]["slug"], **before["settings"], **before["changed"], **before["versions"]}
    for name, value in json.loads(json.dumps(now)).items():
        if (was := then.pop(name, "absent")) != value:
            raise _other(plan, name, was, value)
    for name, value in then.items():
        raise _other(plan, name, value, "absent")


def _other(plan: Plan, name: str, then: Any, now: Any) -> ExperimentError:
    return ExperimentError(
        f"{plan.out} holds an experiment with another {name}: {then} there, {now} here; resume with the same, or "
        "choose another --out"
    )


def _changed(settings: Settings, usual: Settings) -> dict[str, Any]:
    """The fields in which settings differ from a scale's."""
    ours, theirs = dataclasses.asdict(settings), dataclasses.asdict(usual)
    return {name: value for name, value in ours.items() if value != theirs[name]}
