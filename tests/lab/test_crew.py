"""Worker processes: what they are told, what they tell, and how they end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import crew_program
import pytest
from crew_program import work

from regimen.lab.crew import Crew, Report


@pytest.fixture
def crew() -> Iterator[Crew]:
    with Crew(2, work) as crew:
        yield crew


def end(crew: Crew) -> list[Report]:
    """Everything reported until nobody is busy."""
    reports = []
    deadline = time.time() + 30
    while crew.busy and time.time() < deadline:
        reports += crew.wait(0.1)
    return reports


def test_results_come_back_under_their_keys(crew: Crew) -> None:
    crew.submit("a", ("give", 1))
    crew.submit("b", ("give", 2))
    assert crew.free == 0
    assert {r.key: (r.kind, r.content) for r in end(crew)} == {"a": ("done", (1, "1")), "b": ("done", (2, "1"))}


def test_an_exception_is_reported_and_the_worker_goes_on(crew: Crew) -> None:
    crew.submit("a", ("raise", "nothing there"))
    assert end(crew) == [Report("a", "failed", "KeyError: 'nothing there'")]
    crew.submit("b", ("give", 1))
    assert end(crew)[0].kind == "done"


def test_a_death_concerns_its_own_task_only(crew: Crew, tmp_path: Path) -> None:
    crew.submit("patient", ("wait", str(tmp_path / "file")))
    crew.submit("victim", ("die", signal.SIGKILL))
    reports = []
    while not any(r.kind == "died" for r in reports):
        reports += crew.wait(1.0)
    assert [r for r in reports if r.kind == "died"] == [
        Report("victim", "died", "killed by SIGKILL; the system may be short of memory")
    ]
    assert crew.busy == 1
    crew.submit("next", ("give", 3))
    crew.stop()
    assert {(r.key, r.kind) for r in end(crew)} >= {("patient", "stopped"), ("next", "done")}


def test_workers_stop_when_their_parent_is_gone(tmp_path: Path) -> None:
    file = tmp_path / "file"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, crew_program.__file__, str(file)], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    deadline = time.time() + 20
    while not file.exists() and time.time() < deadline:
        time.sleep(0.02)
    assert file.read_text() == "stopped"


def test_a_crew_has_someone_in_it() -> None:
    with pytest.raises(ValueError, match="a crew of 0 workers; expected one or more"):
        Crew(0, work)
