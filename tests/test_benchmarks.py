"""The benchmarks' books: every job can be imported without a peer, and the page shows what was measured."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PEERS = ("stable_baselines3", "trl", "d3rlpy")


class Benchmarks:
    """The modules, imported afresh where there are no peers."""

    def __init__(self) -> None:
        self.harness = importlib.import_module("benchmarks.harness")
        self.page = importlib.import_module("benchmarks.page")

    def row(self, ours: list[float], theirs: list[float], **changes: Any) -> Any:
        """A row with some figures."""
        measured = [[self.harness.Measurement(figure) for figure in figures] for figures in (ours, theirs)]
        machine = {"processor": "Abacus", "cores": 2, "torch": "2.0"}
        fields = {"job": "flow", "unit": "samples/s", "peer": "bare", "target": 0.8, "wanted": "at least", **changes}
        loads = [0.1] * len(ours)
        return self.harness.Row(
            **fields, ours=measured[0], theirs=measured[1], loads=loads, machine=machine, date="2026-01-01"
        )

    def job(self, **changes: Any) -> Any:
        """A job that measures nothing."""
        fields = {"name": "j", "unit": "s", "ours": None, "theirs": None, "peer": "bare", "target": 1.0, **changes}
        return self.harness.Job(**fields)


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Benchmarks:
    monkeypatch.syspath_prepend(ROOT)
    for name in PEERS:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.split(".")[0] == "benchmarks"]:
        monkeypatch.delitem(sys.modules, name)
    return Benchmarks()


def test_every_job_has_a_target_and_says_what_limits_it(benchmarks: Benchmarks) -> None:
    jobs = benchmarks.harness.catalogue()
    assert {"flow", "loop-cost"} <= jobs.keys()
    for name, job in jobs.items():
        assert job.target > 0, name
        assert job.bound.strip(), f"{name} does not say what limits it"
        assert (job.theirs is None) == (job.peer == ""), f"{name}: a peer is named if and only if it is measured"


def test_page_shows_what_was_measured(benchmarks: Benchmarks) -> None:
    page = benchmarks.page
    text, rows = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8"), benchmarks.harness.load(page.RESULTS)
    assert page.filled(text, rows) == text, "run python -m benchmarks --page docs/benchmarks.md"
    assert rows.keys() <= benchmarks.harness.catalogue().keys()


def test_page_keeps_all_but_the_table(benchmarks: Benchmarks) -> None:
    page = benchmarks.page
    before = f"above\n{page.BEGIN}\nold\n{page.END}\nbelow\n"
    after = page.filled(before, {"flow": benchmarks.row([1.0, 3.0, 2.0], [2.0, 2.0, 2.0])})
    assert after.startswith("above\n")
    assert after.endswith(f"\n{page.END}\nbelow\n")
    assert "old" not in after
    assert "| `flow` | samples/s | 2 (3) | bare | 2 (2) | 1.00 | >= 0.8: reached | 2026-01-01, 3 times" in after
    assert "Machine: Abacus, 2 cores; torch 2.0." in after


@pytest.mark.parametrize("text", ["no markers", "<!-- end -->\n<!-- begin: python -m benchmarks --page -->"])
def test_page_without_a_place_for_the_table_is_refused(benchmarks: Benchmarks, text: str) -> None:
    with pytest.raises(ValueError, match="the page has no place for the table; expected a line '<!-- begin"):
        benchmarks.page.filled(text, {})


def test_smaller_is_better_where_a_job_says_so(benchmarks: Benchmarks) -> None:
    row = benchmarks.row([3.0, 1.0, 2.0], [], peer="", target=1.5, wanted="at most", unit="ms")
    assert (row.ratio, row.reached, row.spread("ours"), row.spread("theirs")) == (2.0, False, "2 (1)", "")
    assert row.verdict == "<= 1.5 ms: missed"


def test_results_survive_the_file_and_replace_older_ones(benchmarks: Benchmarks, tmp_path: Path) -> None:
    harness, file = benchmarks.harness, tmp_path / "results.json"
    harness.save([benchmarks.row([1.0], [2.0]), benchmarks.row([5.0], [1.0], job="other")], file)
    newer = benchmarks.row([4.0], [2.0])
    harness.save([newer], file)
    rows = harness.load(file)
    assert rows["flow"] == newer
    assert rows["other"].ratio == 5


def test_sides_that_come_to_other_results_are_an_error(benchmarks: Benchmarks, monkeypatch: pytest.MonkeyPatch) -> None:
    harness = benchmarks.harness
    monkeypatch.setattr(harness, "_quiet", lambda *_: 0.0)
    loss = {"ours": 1.02, "theirs": 1.0}
    monkeypatch.setattr(harness, "_apart", lambda job, side, seed: harness.Measurement(1.0, {"loss": loss[side]}))
    job = benchmarks.job(theirs=lambda seed: None, tolerance=0.01)
    with pytest.raises(RuntimeError, match=r"'loss' is 1.02 of ours and 1 of bare: further apart than 0.01 of it"):
        harness.measure(job, 1)
    assert len(harness.measure(benchmarks.job(theirs=lambda seed: None, tolerance=0.05), 2).theirs) == 2


def test_unknown_job_names_those_there_are(benchmarks: Benchmarks) -> None:
    with pytest.raises(KeyError, match="no job 'flo'; there are: .*flow.*loop-cost"):
        benchmarks.harness.find("flo")
