"""What a report draws, taken from `results.json` and the run folders: points only, no ink."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from regimen.lab.jobs import run_folder
from regimen.lab.plots import START, Curve, colours
from regimen.lab.results import shown_metrics
from regimen.lab.statistics import intervals
from regimen.runs import read_metrics

Results = Mapping[str, Any]
Band = tuple[list[float], list[float], list[float]]
"""Mean, low and high at each point."""

_BINS = 30
_MOST_PANELS = 12


def trained(results: Results) -> list[str]:
    """Arms with a result of at least one seed."""
    return [name for name, seeds in results["arms"].items() if seeds]


def families(results: Results) -> dict[str | None, list[str]]:
    """Trained arms by the arm that they start from: those of a family share their iterations' axis."""
    found: dict[str | None, list[str]] = {}
    for name in trained(results):
        found.setdefault(results["paper"]["arms"][name]["start"], []).append(name)
    return found


def learning_curves(results: Results, family: Sequence[str], start: str | None) -> dict[str, list[Curve]]:
    """By metric: a curve per arm of a family over iterations, and a line at the level of what they start from."""
    paper, colour = results["paper"], colours(results["paper"]["arms"], results["paper"]["method"])
    by_arm = {name: _bands(results, name) for name in family}
    panels: dict[str, list[Curve]] = {}
    for metric in shown_metrics(results):
        curves = []
        for name, (iterations, ends, bands) in by_arm.items():
            if metric not in bands:
                continue
            mean, low, high = bands[metric]
            title, strong = paper["arms"][name]["title"], name == paper["method"]
            marks = ends if len(ends) > 1 else ()
            curves.append(Curve(title, colour[name], iterations, mean, low, high, strong, marks))
        level = results["intervals"].get(start, {}).get(metric, {}).get("mean") if start else None
        if curves and level is not None:
            span = [min(c.x[0] for c in curves), max(c.x[-1] for c in curves)]
            curves.insert(0, Curve(f"start: {paper['arms'][start]['title']}", START, span, [level, level], dashed=True))
        if curves:
            panels[metric] = curves
    return panels


def reward_curves(out: Path, results: Results) -> dict[str, list[Curve]]:
    """By reward component: a curve per arm, mean over seeds, in bins of iterations."""
    paper, colour = results["paper"], colours(results["paper"]["arms"], results["paper"]["method"])
    panels: dict[str, list[Curve]] = {}
    for name in trained(results):
        collected: dict[str, dict[int, list[float]]] = {}
        for seed in results["arms"][name]:
            for iteration, metrics in _steps(out, name, seed):
                for key, value in metrics.items():
                    if key.startswith("reward/") and key != "reward/total_std":
                        collected.setdefault(key, {}).setdefault(iteration, []).append(value)
        for key, points in collected.items():
            x, y = _binned(points)
            title, strong = paper["arms"][name]["title"], name == paper["method"]
            panels.setdefault(key, []).append(Curve(title, colour[name], x, y, strong=strong))
    return dict(sorted(panels.items())[:_MOST_PANELS])


def knob_curves(out: Path, results: Results) -> dict[str, list[Curve]]:
    """By knob that moved anywhere: its value over the iterations of each arm that has it, for the first seed."""
    paper, colour = results["paper"], colours(results["paper"]["arms"], results["paper"]["method"])
    panels: dict[str, list[Curve]] = {}
    moved: set[str] = set()
    for name in trained(results):
        histories: dict[str, tuple[list[float], list[float]]] = {}
        for iteration, metrics in _steps(out, name, next(iter(results["arms"][name]))):
            for key, value in metrics.items():
                if key.startswith("knob/"):
                    x, y = histories.setdefault(key.removeprefix("knob/"), ([], []))
                    x.append(iteration)
                    y.append(value)
        for knob, (x, y) in histories.items():
            if len(set(y)) > 1:
                moved.add(knob)
            title, strong = paper["arms"][name]["title"], name == paper["method"]
            panels.setdefault(knob, []).append(Curve(title, colour[name], x, y, strong=strong))
    return {knob: panels[knob] for knob in sorted(moved)[:_MOST_PANELS]}


def stage_matrix(results: Results, arm: str) -> tuple[list[str], list[list[float]]]:
    """Stages of an arm ("start" first) and, for each, the metrics at its end, mean over seeds."""
    seeds = list(results["arms"][arm].values())
    stages = ["start", *seeds[0]["stages"]]
    rows = []
    for stage in stages:
        ends = [_last(entry["evaluations"], stage) for entry in seeds]
        rows.append([_mean(end.get(metric) for end in ends) for metric in shown_metrics(results)])
    return stages, rows


def _bands(results: Results, arm: str) -> tuple[list[float], list[float], dict[str, Band]]:
    """Iterations evaluated with every seed, those that end a stage, and by metric mean, low and high at each."""
    seeds = [{record["iterations"]: record for record in e["evaluations"]} for e in results["arms"][arm].values()]
    common = sorted(set.intersection(*(set(seed) for seed in seeds)))
    metrics = [m for m in shown_metrics(results) if common and m in seeds[0][common[0]]["metrics"]]
    keys = [(iteration, metric) for metric in metrics for iteration in common]
    table = [[_number(seed[i]["metrics"].get(metric)) for i, metric in keys] for seed in seeds]
    found = intervals(table) if keys else []
    size = len(common)
    bands: dict[str, Band] = {}
    for position, metric in enumerate(metrics):
        part = found[position * size : (position + 1) * size]
        bands[metric] = ([e.mean for e in part], [e.low for e in part], [e.high for e in part])
    stages = {
        record["stage"]: record["iterations"] for record in next(iter(results["arms"][arm].values()))["evaluations"]
    }
    return [float(i) for i in common], [float(i) for stage, i in stages.items() if stage != "start"], bands


def _steps(out: Path, arm: str, seed: str) -> Iterable[tuple[int, Mapping[str, float]]]:
    for record in read_metrics(run_folder(out, arm, int(seed)) / "metrics.jsonl"):
        if record["kind"] == "step":
            yield record["iterations"], record["metrics"]


def _binned(points: Mapping[int, Sequence[float]]) -> tuple[list[float], list[float]]:
    """Means in up to `_BINS` bins of neighbouring iterations."""
    order = sorted(points)
    size = math.ceil(len(order) / _BINS)
    x, y = [], []
    for first in range(0, len(order), size):
        part = order[first : first + size]
        x.append(_mean(map(float, part)))
        y.append(_mean(value for iteration in part for value in points[iteration]))
    return x, y


def _last(evaluations: Sequence[Mapping[str, Any]], stage: str) -> Mapping[str, float]:
    found: Mapping[str, float] = next((r["metrics"] for r in reversed(evaluations) if r["stage"] == stage), {})
    return found


def _mean(values: Iterable[float | None]) -> float:
    numbers = [_number(value) for value in values]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _number(value: float | None) -> float:
    return math.nan if value is None else value
