"""`report.html`: an experiment on one self-contained page, made from its folder alone."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from regimen.lab import curves, plots
from regimen.lab.experiment import SPENT
from regimen.lab.jobs import run_folder
from regimen.lab.results import bracket, left_out, number, read_results, shown_metrics
from regimen.lab.settings import format_seeds
from regimen.lab.statistics import caution
from regimen.storage import StorageError, replacing, write_text

FILE = "report.html"
_TONES = {"holds": "holds", "unclear": "unclear", "does not hold": "not"}
_TEXT_LINES = 20

Results = Mapping[str, Any]
Section = dict[str, Any]


def write_report(out: Path) -> Path:
    """Write `report.html`, and its figures under `plots/`, from `results.json` and the run folders.

    Raises:
        ExperimentError: the folder holds no experiment.
        StorageError: the report cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    results = read_results(out)
    gallery = _Gallery(out / "plots")
    sections = [_learning(results, gallery), _rewards(out, results, gallery), _knobs(out, results, gallery)]
    template = resources.files("regimen.lab").joinpath("report.html.j2").read_text(encoding="utf-8")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True).from_string(
        template
    )
    text = page.render(
        **_words(results),
        forests=_forests(results, gallery),
        matrices=_matrices(results, gallery),
        sections=[section for section in sections if section["images"]],
        samples=_samples(out, results),
        tone=_TONES,
        number=number,
        bracket=bracket,
    )
    write_text(out / FILE, text)
    return out / FILE


def command(results: Results) -> str:
    """The command that repeats an experiment."""
    words = [
        f"regimen run {results['paper']['slug']} --scale {results['scale']}",
        f"--seeds {format_seeds(results['seeds'])} --arms {','.join(results['arms'])}",
        *(f"--set {name}={_text(value)}" for name, value in results["changed"].items()),
    ]
    return " ".join(words)


class _Gallery:
    """Saves figures as PNG files and gives them as data for the page."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        try:
            folder.mkdir(exist_ok=True)
            for old in folder.glob("*.png"):
                old.unlink()
        except OSError as error:
            raise StorageError(f"{folder} cannot be written: {error}") from error

    def add(self, name: str, figure: Figure) -> dict[str, str]:
        """Save a figure; its name and data."""
        content = plots.png(figure)
        with replacing(self._folder / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.png") as path:
            path.write_bytes(content)
        return {"name": name, "data": _data(content)}


def _words(results: Results) -> dict[str, Any]:
    """Everything on the page but the pictures."""
    seconds = results["wall_clock_seconds"]
    return {
        "results": results,
        "paper": results["paper"],
        "metrics": shown_metrics(results),
        "seeds": format_seeds(results["seeds"]),
        "finished": sum(len(seeds) for seeds in results["arms"].values()),
        "planned": len(results["arms"]) * len(results["seeds"]),
        "reasons": _reasons(results),
        "arms": [_arm(results, name) for name in curves.trained(results)],
        "spent_labels": list(SPENT.values()),
        "warnings": _warnings(results),
        "command": command(results),
        "duration": f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.1f} min",
    }


def _reasons(results: Results) -> list[str]:
    """What stands in the verdict's box: each judged claim in a sentence, and what limits the verdict."""
    sentences = []
    for claim in results["claims"]:
        if claim["judged"]:
            found = f"{number(claim['mean'])} {bracket(claim)}".strip()
            sentences.append(f"{claim['text']}: {claim['verdict']} ({found}; threshold {claim['above']:g}).")
    remarks = [left_out(results), caution(len(results["seeds"])) if results["claims"] else ""]
    sentences += [remark for remark in remarks if remark]
    if results["scale"] == "quick":
        sentences.append("Scale quick is a smoke test: far too short to say anything about the paper.")
    if results["changed"]:
        sentences.append(f"Settings differ from the paper's scale: {', '.join(results['changed'])}.")
    return sentences


def _arm(results: Results, name: str) -> dict[str, Any]:
    """A row of the arms' table."""
    paper, seeds = results["paper"], results["arms"][name]
    found = results["intervals"][name]
    spent = []
    for what in SPENT:
        value, reference = _spent(seeds, what), _spent(results["arms"].get(paper["method"], {}), what)
        differs = reference and what != "seconds" and abs(value / reference - 1) > 0.005
        spent.append({"value": f"{value:,.0f}", "factor": f"× {value / reference:.2f}" if differs else ""})
    return {
        "title": paper["arms"][name]["title"],
        "method": name == paper["method"],
        "seeds": len(seeds),
        "metrics": [found[metric] for metric in shown_metrics(results)],
        "spent": spent,
    }


def _spent(seeds: Mapping[str, Any], what: str) -> float:
    return sum(entry.get(what, 0) for entry in seeds.values()) / len(seeds) if seeds else 0.0


def _warnings(results: Results) -> list[dict[str, Any]]:
    """Health warnings over all runs, the most frequent first."""
    counts: dict[str, int] = {}
    arms: dict[str, set[str]] = {}
    for name, seeds in results["arms"].items():
        for entry in seeds.values():
            for text, count in entry["warnings"].items():
                counts[text] = counts.get(text, 0) + count
                arms.setdefault(text, set()).add(name)
    order = sorted(counts, key=lambda text: -counts[text])
    return [{"text": text, "arms": ", ".join(sorted(arms[text])), "count": counts[text]} for text in order]


def _forests(results: Results, gallery: _Gallery) -> list[dict[str, str]]:
    """The claims' values, those that are judged apart from those that are not."""
    images = []
    for judged, name in ((True, "judged claims"), (False, "comparisons")):
        claims = [c for c in results["claims"] if c["judged"] == judged and c["mean"] is not None]
        if claims:
            images.append(gallery.add(name, plots.forest(claims)))
    return images


def _matrices(results: Results, gallery: _Gallery) -> list[dict[str, str]]:
    """A table in colours for every arm of several stages."""
    metrics, images = shown_metrics(results), []
    for name in curves.trained(results):
        stages, rows = curves.stage_matrix(results, name)
        if len(stages) > 2 and metrics:
            labels = [stage if stage == "start" else f"after {stage}" for stage in stages]
            figure = plots.matrix(results["paper"]["arms"][name]["title"], labels, list(metrics.values()), rows)
            images.append(gallery.add(f"stages {name}", figure))
    return images


def _learning(results: Results, gallery: _Gallery) -> Section:
    paper, images = results["paper"], []
    for start, family in sorted(curves.families(results).items(), key=lambda item: item[0] is None):
        for metric, panel in curves.learning_curves(results, family, start).items():
            label = paper["metrics"][metric]
            where = "" if start else " (from scratch)"
            images.append(gallery.add(f"{metric}{where}", plots.lines(panel, f"{label}{where}", "iterations", label)))
    text = (
        "Mean over seeds, with its 95 % interval as a band. Dots mark the ends of stages where there are several. What "
        "an iteration costs differs between arms: the table above has samples and gradient steps."
    )
    return {"title": "Learning curves", "text": text, "images": images}


def _rewards(out: Path, results: Results, gallery: _Gallery) -> Section:
    images = []
    for name, panel in curves.reward_curves(out, results).items():
        figure = plots.lines(panel, name.removeprefix("reward/"), "iterations", "raw reward")
        images.append(gallery.add(name, figure))
    text = "Raw components as task/component, before weights; total is what credit consumed. Mean over seeds, in bins."
    return {"title": "Rewards", "text": text, "images": images}


def _knobs(out: Path, results: Results, gallery: _Gallery) -> Section:
    images = []
    for name, panel in curves.knob_curves(out, results).items():
        images.append(gallery.add(f"knob {name}", plots.lines(panel, name, "iterations", "value", steps=True)))
    return {"title": "Knobs that moved", "text": "Values in force, first seed.", "images": images}


def _samples(out: Path, results: Results) -> list[dict[str, Any]]:
    """Sample sheets by kind: of what the method starts from, then of the method, before and after each stage."""
    arms, method = results["paper"]["arms"], results["paper"]["method"]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for name in (arms[method]["start"], method):
        seeds = results["arms"].get(name, {})
        if not seeds:
            continue
        seed, entry = next(iter(seeds.items()))
        folder = run_folder(out, name, int(seed)) / "samples"
        ends = {record["stage"]: record["iterations"] for record in entry["evaluations"]}
        if kinds:
            ends.pop("start", None)  # The end of the arm before.
        for stage, iterations in ends.items():
            prefix = f"{iterations:06d}-{stage}-"
            for path in sorted(folder.glob(f"{prefix}*")):
                caption = f"{arms[name]['title']}, seed {seed}: " + ("before" if stage == "start" else f"after {stage}")
                text = None if path.suffix == ".png" else "\n".join(path.read_text("utf-8").splitlines()[:_TEXT_LINES])
                sheet = {"caption": caption, "text": text, "data": _data(path.read_bytes()) if text is None else ""}
                kinds.setdefault(path.stem.removeprefix(prefix), []).append(sheet)
    return [{"name": name.replace("_", " "), "sheets": sheets} for name, sheets in kinds.items()]


def _data(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
