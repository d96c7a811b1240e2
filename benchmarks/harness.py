"""What a job is, and how two sides of one are measured: in turn, each time in a process of its own."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, Literal

import psutil

PACKAGES = (
    "regimen-rl",
    "torch",
    "transformers",
    "trl",
    "stable-baselines3",
    "d3rlpy",
    "gymnasium",
    "mujoco",
    "scikit-learn",
    "numpy",
)
Side = Literal["ours", "theirs"]


@dataclass(frozen=True)
class Measurement:
    """What one process measured.

    Attributes:
        figure: in the job's unit.
        results: what the work came to (losses, returns), to be compared between the sides.
        parts: seconds of the parts of the work, for the profile.
    """

    figure: float
    results: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """A piece of work that is done by both sides with the same model, data, batch, steps, threads and seeds.

    Attributes:
        name: of its row.
        unit: of its figure.
        ours: seed to measurement.
        theirs: the same by the peer, `None` where the target is a figure of ours alone.
        peer: who that is.
        target: of ours/theirs, or of ours where there is no peer.
        wanted: whether the ratio is to be at least, or at most, the target.
        tolerance: how far results of equal names may be apart, relative to the peer's; `None` where the sides draw
            from different random streams, and results are shown and not compared.
        bound: what limits the figure, and how far ours is from that.
    """

    name: str
    unit: str
    ours: Callable[[int], Measurement]
    theirs: Callable[[int], Measurement] | None
    peer: str
    target: float
    wanted: Literal["at least", "at most"] = "at least"
    tolerance: float | None = None
    bound: str = ""

    @property
    def sides(self) -> tuple[Side, ...]:
        """Who is measured."""
        return ("ours",) if self.theirs is None else ("ours", "theirs")


@dataclass(frozen=True)
class Row:
    """The measurements of a job.

    Attributes:
        job: its name; unit, peer, target, wanted: see `Job`.
        ours, theirs: measurements in the order in which they were made.
        loads: share of the processors that was busy before each repetition.
        machine, date: where and when.
    """

    job: str
    unit: str
    peer: str
    target: float
    wanted: str
    ours: list[Measurement]
    theirs: list[Measurement]
    loads: list[float]
    machine: Mapping[str, Any]
    date: str

    @classmethod
    def of(cls, job: Job) -> Row:
        """A job's row before anything is measured, here and today."""
        today = time.strftime("%Y-%m-%d")
        return cls(job.name, job.unit, job.peer, job.target, job.wanted, [], [], [], machine(), today)

    @classmethod
    def from_json(cls, saved: Mapping[str, Any]) -> Row:
        """A row of a results file."""
        sides = {side: [Measurement(**entry) for entry in saved[side]] for side in ("ours", "theirs")}
        return cls(**{**{f.name: saved[f.name] for f in fields(cls)}, **sides})

    def spread(self, side: Side) -> str:
        """Median and best of a side's figures; nothing if it was not measured."""
        figures = [m.figure for m in getattr(self, side)]
        best = max if self.wanted == "at least" else min
        return f"{shown(statistics.median(figures))} ({shown(best(figures))})" if figures else ""

    @property
    def verdict(self) -> str:
        """The target, and whether it is reached."""
        sign, unit = ">=" if self.wanted == "at least" else "<=", "" if self.theirs else f" {self.unit}"
        return f"{sign} {self.target:g}{unit}: {'reached' if self.reached else 'missed'}"

    @property
    def ratio(self) -> float:
        """Median of ours over median of theirs; ours alone without a peer."""
        ours = statistics.median(m.figure for m in self.ours)
        return ours / statistics.median(m.figure for m in self.theirs) if self.theirs else ours

    @property
    def reached(self) -> bool:
        """Whether the target is."""
        return self.ratio >= self.target if self.wanted == "at least" else self.ratio <= self.target


def shown(figure: float) -> str:
    """A figure with as many digits as it deserves."""
    return f"{figure:,.0f}" if abs(figure) >= 1000 else f"{figure:.3g}"


def find(name: str) -> Job:
    """The job of a name; `KeyError` with those there are."""
    jobs = catalogue()
    if name not in jobs:
        raise KeyError(f"no job '{name}'; there are: {', '.join(jobs)}")
    return jobs[name]


def catalogue() -> dict[str, Job]:
    """All jobs by name, in the order of the files in `jobs/`."""
    files = sorted((Path(__file__).parent / "jobs").glob("[a-z]*.py"))
    found = [job for file in files for job in import_module(f"benchmarks.jobs.{file.stem}").JOBS]
    return {job.name: job for job in found}


def measure(job: Job, repeats: int, busiest: float = 0.15, patience_s: float = 120.0) -> Row:
    """Measure the sides in turn, A B A B, each time in a fresh process, and each pair with a seed of its own.

    Args:
        job: what.
        repeats: pairs.
        busiest: share of the processors that may be busy with other work before a pair.
        patience_s: how long quiet is waited for; then the pair is measured all the same, and the load is in the row.

    Raises:
        RuntimeError: a side failed, or the two came to results that are further apart than the job tolerates.
    """
    row = Row.of(job)
    for seed in range(repeats):
        row.loads.append(_quiet(busiest, patience_s))
        for side in job.sides:
            getattr(row, side).append(_apart(job.name, side, seed))
        if job.tolerance is not None and row.theirs:
            _check_same(job, row.ours[-1].results, row.theirs[-1].results)
    return row


def _check_same(job: Job, ours: Mapping[str, float], theirs: Mapping[str, float]) -> None:
    for name in ours.keys() & theirs.keys():
        if abs(ours[name] - theirs[name]) > job.tolerance * abs(theirs[name]):
            raise RuntimeError(
                f"job '{job.name}': '{name}' is {ours[name]:g} of ours and {theirs[name]:g} of {job.peer}: further "
                f"apart than {job.tolerance:g} of it; the two sides do not do the same work"
            )


def _quiet(busiest: float, patience_s: float) -> float:
    end = time.monotonic() + patience_s
    while (load := psutil.cpu_percent(1.0) / 100) > busiest and time.monotonic() < end:
        time.sleep(1)
    return load


def _apart(job: str, side: Side, seed: int) -> Measurement:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, "-m", "benchmarks.worker", job, side, str(seed)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parent.parent)
    if done.returncode:
        raise RuntimeError(f"job '{job}' ({side}, seed {seed}) failed:\n{done.stderr[-3000:]}")
    return Measurement(**json.loads(done.stdout.splitlines()[-1]))


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"processor": _processor(), "cores": os.cpu_count(), "python": platform.python_version(), **versions}


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def save(rows: list[Row], path: Path) -> None:
    """Add rows to the results in a file; a job's newest row replaces its older one."""
    kept = json.loads(path.read_text()) if path.exists() else {}
    for row in rows:
        kept[row.job] = {**asdict(row), "ratio": row.ratio}
    path.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")


def load(path: Path) -> dict[str, Row]:
    """The rows of a results file, by the names of their jobs."""
    return {name: Row.from_json(saved) for name, saved in json.loads(path.read_text()).items()}
