"""`results.json`: what an experiment found, in one file that stands by itself.

Numbers that are not finite are `null`. Version 1 holds:

- `version`: 1
- `paper`: `slug`, `title`, `arxiv`, `claim`, `method` (name of the arm that the paper is about), `metrics` (label by
  name, the most important first), `arms` (by name: `title`, `start`)
- `scale`, `seeds`; `settings` (all of the paper's); `changed` (those given by `--set`, knobs among them)
- `versions` (regimen, python, torch, numpy); `machine` (platform, cpus, workers)
- `arms`: by arm and by seed: `stages`, `evaluations` (`stage`, `step`, `iterations`, `samples`, `rows`,
  `drawn`, `gradient_steps`, `metrics`), `final` (metrics at the end), `samples`, `rows`, `drawn`, `gradient_steps`,
  `seconds` (those of the arms that it starts from included), `own` (the same five without them), `cached` (whether an
  earlier experiment trained it), `warnings` (counts by text)
- `intervals`: by arm and by metric: `mean`, `low`, `high` over seeds at the end
- `claims`: `name`, `text`, `arms`, `above`, `judged`, `values` (by seed), `missing` (reason by seed), `mean`, `low`,
  `high`, `verdict`, `note`
- `left_out`: claims not computed because their arms were not asked for: `name`, `text`, `judged`, `needs`
- `verdict`: "holds", "unclear" or "does not hold"
- `failures`: `arm`, `seed`, `reason`
- `wall_clock_seconds`: of the experiment, over all its sessions
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import regimen
from regimen.lab.experiment import SPENT, ArmResult, ExperimentError, Paper, Settings
from regimen.lab.jobs import JobResult, charged
from regimen.lab.statistics import Interval, JudgedClaim, intervals, judge_claim, verdict
from regimen.storage import write_text

VERSION = 1
FILE = "results.json"
_KEYS: dict[str, type | tuple[type, ...]] = {
    "version": int, "paper": dict, "scale": str, "seeds": list, "settings": dict, "changed": dict, "versions": dict,
    "machine": dict, "arms": dict, "intervals": dict, "claims": list, "left_out": list, "verdict": str,
    "failures": list, "wall_clock_seconds": (int, float),
}  # fmt: skip


@dataclass(frozen=True)
class Failure:
    """A job that has no result, and why."""

    arm: str
    seed: int
    reason: str


@dataclass
class Findings:
    """What an experiment has found so far.

    Attributes:
        paper, scale, settings, changed: what is trained.
        arms, seeds: those that were asked for.
        jobs: results by seed and arm.
        failures: jobs without a result.
        workers, seconds: how it is run, and for how long so far.
    """

    paper: Paper
    scale: str
    settings: Settings
    changed: Mapping[str, Any]
    arms: Sequence[str]
    seeds: Sequence[int]
    jobs: dict[int, dict[str, JobResult]] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    workers: int = 1
    seconds: float = 0.0

    def results(self) -> dict[int, dict[str, ArmResult]]:
        """By seed and arm, with the costs of the arms that each starts from."""
        return {
            seed: {
                name: charged(self.paper.arm(name), self.paper, jobs) for name in self.arms if self._there(name, jobs)
            }
            for seed, jobs in self.jobs.items()
        }

    def _there(self, name: str | None, jobs: Mapping[str, JobResult]) -> bool:
        """Whether an arm is trained, and all that it starts from: somebody may have removed a folder."""
        while name is not None and name in jobs:
            name = self.paper.arm(name).start
        return name is None

    def as_json(self) -> dict[str, Any]:
        """The content of `results.json`; see the module."""
        results = self.results()
        there = [claim for claim in self.paper.claims if set(claim.arms) <= set(self.arms)]
        left = [claim for claim in self.paper.claims if claim not in there]
        judged = [judge_claim(claim, self.seeds, results) for claim in there]
        return {
            "version": VERSION,
            "paper": _paper(self.paper),
            "scale": self.scale,
            "seeds": list(self.seeds),
            "settings": _plain(dataclasses.asdict(self.settings)),
            "changed": _plain(dict(self.changed)),
            "versions": versions(),
            "machine": {
                "platform": f"{platform.system()} {platform.machine()}",
                "cpus": os.cpu_count(),
                "workers": self.workers,
            },
            "arms": _plain({name: self._arm(name, results) for name in self.arms}),
            "intervals": _plain({name: self._intervals(name, results) for name in self.arms}),
            "claims": [_claim(claim) for claim in judged],
            "left_out": [
                {"name": c.name, "text": c.text, "judged": c.judged, "needs": [a for a in c.arms if a not in self.arms]}
                for c in left
            ],
            "verdict": verdict(judged, any(claim.judged for claim in left)),
            "failures": [vars(failure) for failure in self.failures],
            "wall_clock_seconds": round(self.seconds, 1),
        }

    def write(self, out: Path) -> dict[str, Any]:
        """Write `results.json`, all or nothing, and return it."""
        content = self.as_json()
        write_text(out / FILE, json.dumps(content, indent=1, allow_nan=False) + "\n")
        return content

    def _arm(self, name: str, results: Mapping[int, Mapping[str, ArmResult]]) -> dict[str, Any]:
        entries = {}
        for seed in self.seeds:
            if name not in results.get(seed, {}):
                continue
            result, own = results[seed][name], self.jobs[seed][name]
            entries[str(seed)] = {
                "stages": own.stages,
                "evaluations": [
                    {k: v for k, v in record.items() if k not in ("kind", "time")} for record in own.evaluations
                ],
                "final": result.final if own.evaluations else {},
                **{what: getattr(result, what) for what in SPENT},
                "own": {what: getattr(own, what) for what in SPENT},
                "cached": own.cached,
                "warnings": own.warnings,
            }
        return entries

    def _intervals(self, name: str, results: Mapping[int, Mapping[str, ArmResult]]) -> dict[str, Any]:
        finals = [results[seed][name].final for seed in self.seeds if name in results.get(seed, {})]
        if not finals:
            return {}
        names = list(self.paper.metrics)
        found = intervals([[final.get(metric, math.nan) for metric in names] for final in finals])
        return {metric: _interval(entry) for metric, entry in zip(names, found, strict=True)}


def versions() -> dict[str, str]:
    """Of the library and of what the numbers depend on."""
    return {
        "regimen": regimen.__version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": np.__version__,
    }


def read_results(out: Path) -> dict[str, Any]:
    """The `results.json` of an experiment's folder.

    Raises:
        ExperimentError: there is none, or it is not one of version 1.
    """
    path = out / FILE
    if not path.exists():
        raise ExperimentError(
            f"{out} holds no experiment: it has no {FILE}; make one with 'regimen run <paper> --out {out}'"
        )
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ExperimentError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        found = content.get("version") if isinstance(content, dict) else type(content).__name__
        raise ExperimentError(f"{path} has version {found}; this release reads version {VERSION}")
    for key, kind in _KEYS.items():
        if not isinstance(content.get(key), kind):
            raise ExperimentError(f"{path}: '{key}' is {type(content.get(key)).__name__}; expected {kind}")
    return content


def shown_metrics(results: Mapping[str, Any]) -> dict[str, str]:
    """Labels, by name, of the paper's metrics that any arm has; the most important first."""
    there = {m for found in results["intervals"].values() for m, entry in found.items() if entry["mean"] is not None}
    return {name: label for name, label in results["paper"]["metrics"].items() if name in there}


def left_out(results: Mapping[str, Any]) -> str:
    """A sentence about the claims that were not computed; empty if all were."""
    claims = results["left_out"]
    if not claims:
        return ""
    judged, needs = sum(c["judged"] for c in claims), sorted({arm for claim in claims for arm in claim["needs"]})
    return (
        f"Left out: {len(claims)} claims ({judged} of them judged), which need arms not asked for: {', '.join(needs)}."
    )


def number(value: float | None) -> str:
    """A number for a table; a dash if there is none."""
    return "–" if value is None else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"


def bracket(entry: Mapping[str, float | None]) -> str:
    """An interval for a table; empty if there is none."""
    return "" if entry["low"] is None else f"[{number(entry['low'])}, {number(entry['high'])}]"


def _paper(paper: Paper) -> dict[str, Any]:
    arms = {arm.name: {"title": arm.title, "start": arm.start} for arm in paper.arms}
    facts = {name: getattr(paper, name) for name in ("slug", "title", "arxiv", "claim", "method")}
    return {**facts, "metrics": dict(paper.metrics), "arms": arms}


def _claim(judged: JudgedClaim) -> dict[str, Any]:
    claim = judged.claim
    entry = {
        "name": claim.name,
        "text": claim.text,
        "arms": list(claim.arms),
        "above": claim.above,
        "judged": claim.judged,
        "values": {str(seed): value for seed, value in judged.values.items()},
        "missing": {str(seed): why for seed, why in judged.missing.items()},
        **_interval(judged.interval),
        "verdict": judged.verdict,
        "note": judged.note,
    }
    plain: dict[str, Any] = _plain(entry)
    return plain


def _interval(found: Interval) -> dict[str, float]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _plain(value: Any) -> Any:
    """A value as strict JSON: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
