"""The report of whole and of partial experiments, and the terminal's view of the same numbers."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import tiny
from PIL import Image
from rich.console import Console

from regimen.lab import plots
from regimen.lab.curves import knob_curves, learning_curves, stage_matrix
from regimen.lab.display import Display, arms_table, verdict_table
from regimen.lab.experiment import ExperimentError
from regimen.lab.report import command, write_report
from regimen.lab.results import bracket, number, read_results
from regimen.lab.runner import Plan, run_experiment

Run = tuple[Path, dict[str, Any], str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out, log = tmp_path_factory.mktemp("report") / "run", io.StringIO()
    with Display(Console(file=log, width=120)) as display:
        plan = Plan(tiny.load, out, seeds=[0, 1], overrides={"rate": "0.06", "emphasis": "0.5"})
        results = run_experiment(plan, display)
    write_report(out)
    return out, results, log.getvalue()


class Outline(HTMLParser):
    """A page's headings, pictures, and whether every element is closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.pictures, self.links = "", [], []
        self._open: list[str] = []
        self.feed(page)
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag == "img":
            self.pictures.append(dict(attributes)["src"])
        elif tag not in ("meta", "br"):
            self._open.append(tag)
        self.links += [value for name, value in attributes if name == "href"]

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_by_itself_and_has_the_numbers(whole: Run) -> None:
    out, results, _ = whole
    page = Outline((out / "report.html").read_text())
    assert all(str(source).startswith("data:image/png;base64,") for source in page.pictures)
    assert page.links == ["https://arxiv.org/abs/0000.00000"]
    for claim in results["claims"]:
        assert claim["text"] in page.text
        assert number(claim["mean"]) in page.text
        assert bracket(claim) in page.text
    for found in results["intervals"].values():
        assert number(found["numbers/closeness"]["mean"]) in page.text
    assert "6 of 6 runs finished" in page.text
    assert "With 2 seeds an interval is rough" in page.text
    assert "Settings differ from the paper's scale: rate, emphasis." in page.text
    assert "absent" not in page.text
    assert "y = " in page.text


def test_figures_are_saved_too(whole: Run) -> None:
    names = {path.name for path in (whole[0] / "plots").iterdir()}
    assert {
        "judged-claims.png",
        "comparisons.png",
        "stages-target.png",
        "numbers-closeness.png",
        "knob-emphasis.png",
    } <= names
    with Image.open(whole[0] / "plots" / "numbers-closeness.png") as picture:
        assert picture.width > 500


def test_the_command_repeats_the_experiment(whole: Run) -> None:
    assert command(whole[1]) == (
        "regimen run tiny --scale default --seeds 0-1 --arms start,astray,target --set rate=0.06 --set emphasis=0.5"
    )


def test_curves_are_means_over_seeds_at_the_iterations_evaluated(whole: Run) -> None:
    _, results, _ = whole
    panels = learning_curves(results, ["astray", "target"], "start")
    level, _, target = panels["numbers/slope"]
    assert level.dashed
    assert level.y[0] == pytest.approx(results["intervals"]["start"]["numbers/slope"]["mean"])
    assert list(target.x) == [0, 4, 8, 12, 16, 20, 24]
    assert list(target.marks) == [12, 24]
    ends = [entry["final"]["numbers/slope"] for entry in results["arms"]["target"].values()]
    assert target.y[-1] == pytest.approx(sum(ends) / 2)
    assert (target.low[-1], target.high[-1]) == pytest.approx((min(ends), max(ends)))


def test_the_matrix_has_a_row_per_stage(whole: Run) -> None:
    stages, rows = stage_matrix(whole[1], "target")
    assert stages == ["start", "first", "second"]
    assert rows[2][0] == pytest.approx(whole[1]["intervals"]["target"]["numbers/closeness"]["mean"])


def test_only_knobs_that_moved_are_drawn(whole: Run) -> None:
    panels = knob_curves(*whole[:2])
    assert list(panels) == ["emphasis"]
    by_label = {curve.label: curve for curve in panels["emphasis"]}
    assert set(by_label["away from the target"].y) == {0.5}
    assert by_label["towards the target"].y[-1] == pytest.approx(2.0, abs=0.1)


def test_partial_results_are_reported_as_far_as_they_go(tmp_path: Path) -> None:
    out = tmp_path / "run"
    results = run_experiment(Plan(tiny.load, out, scale="quick", arms=["start", "broken"], workers=1))
    page = Outline(write_report(out).read_text())
    assert "1 of 2 runs finished" in page.text
    assert "this arm is broken; mend it" in page.text
    assert "Left out: 2 claims (1 of them judged), which need arms not asked for: astray, target." in page.text
    assert number(results["intervals"]["start"]["numbers/slope"]["mean"]) in page.text
    assert results["verdict"] == "unclear"


def test_an_experiment_without_any_result_is_reported(whole: Run, tmp_path: Path) -> None:
    content = dict(whole[1])
    for claim in content["claims"]:
        claim.update(mean=None, low=None, high=None, values={})
    content |= {"arms": {name: {} for name in content["arms"]}, "intervals": {name: {} for name in content["arms"]}}
    (tmp_path / "results.json").write_text(json.dumps(content))
    assert "0 of 6 runs finished" in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "holds no experiment: it has no results.json"),
        ("{", "cannot be read"),
        ("[]", "has version list; this release reads version 1"),
        ('{"version": 7}', "has version 7"),
        ('{"version": 1, "paper": 3}', "'paper' is int; expected"),
    ],
)
def test_a_folder_without_an_experiment_is_refused(text: str | None, message: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "results.json").write_text(text)
    with pytest.raises(ExperimentError, match=message):
        read_results(tmp_path)


def test_a_log_has_a_plain_line_per_finished_job(whole: Run) -> None:
    lines = whole[2].splitlines()
    assert lines[0] == "6 runs"
    assert "\x1b" not in whole[2]
    done = [line for line in lines if re.match(r"\d/6 done \w+ seed \d in \d+ s: numbers/closeness -?\d", line)]
    assert len(done) == 6


def test_the_terminal_shows_claims_and_arms(whole: Run) -> None:
    console = Console(file=io.StringIO(), width=160, record=True)
    console.print(verdict_table(whole[1]), arms_table(whole[1]))
    text = console.export_text()
    assert "Target above astray" in text
    assert "not judged" in text
    assert "towards the target" in text


def test_the_live_display_keeps_a_row_per_running_job() -> None:
    from regimen.lab.jobs import Note
    from regimen.lab.runner import Progress

    stream = io.StringIO()
    with Display(Console(file=stream, force_terminal=True, width=140)) as display:
        display(Progress("plan", jobs=2))
        display(Progress("note", "a", 0, note=Note("begin"), jobs=2))
        display(Progress("note", "a", 0, note=Note("step", "s", 5, 10, 0.5, 0.25), jobs=2))
        display(Progress("note", "a", 0, note=Note("evaluation", "s", 5, 10, 0.5, metrics={"m": 0.75}), jobs=2))
        display(Progress("note", "a", 0, note=Note("step", "s", 6, 10, 0.6, 0.3), jobs=2))
        display(Progress("note", "a", 0, note=Note("warning", "s", 6, 10, 0.6, text="raise [this] knob"), jobs=2))
        display(Progress("died", "a", 0, text="killed by SIGKILL", jobs=2))
        display(Progress("done", "a", 0, metrics={"m": 0.8}, finished=1, jobs=2))
        display(Progress("failed", "b", 0, text="no room", finished=2, jobs=2))
        display(Progress("stopping", text="0 jobs finish", finished=2, jobs=2))
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
    for part in ("raise [this] knob", "m 0.800", "no room", "killed by SIGKILL", "Ctrl-C again", "2/2"):
        assert part in text


def test_arms_keep_their_colours_and_the_method_stands_out() -> None:
    arms = {"base": {"start": None}, "a": {"start": "base"}, "method": {"start": "base"}, "b": {"start": "base"}}
    chosen = plots.colours(arms, "method")
    assert chosen["method"] == plots.METHOD
    assert chosen["base"] == plots.START
    assert len(set(chosen.values())) == 4


def test_no_two_lines_of_a_figure_look_alike() -> None:
    shades = [*plots.COLOURS, *plots.COLOURS, plots.START, plots.START]
    curves = [plots.Curve(f"arm {number}", shade, [0, 1], [0, 1]) for number, shade in enumerate(shades)]
    curves.append(plots.Curve("level", plots.START, [0, 1], [1, 1], dashed=True))
    (axes,) = plots.lines(curves, "", "", "").axes
    looks = {(line.get_color(), str(line._dash_pattern)) for line in axes.get_lines()}
    assert len(looks) == len(curves)


def test_a_metric_that_an_arm_never_has_leaves_its_column_of_the_matrix_empty(recwarn: pytest.WarningsRecorder) -> None:
    figure = plots.matrix("arm", ["start", "after fit"], ["error", "isolated"], [[math.nan, math.nan], [0.2, math.nan]])
    assert [text.get_text() for text in figure.axes[0].texts] == ["–", "–", "0.20", "–"]
    assert len(recwarn) == 0
