"""Experiments through the public interface: order, equality, deaths, failures, interruption, resumption."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny

from regimen.lab.experiment import ExperimentError
from regimen.lab.results import read_results
from regimen.lab.runner import Plan, Progress, run_experiment
from regimen.storage import StorageError

Told = list[Progress]
Whole = tuple[Path, dict[str, Any], list[Progress]]


def run(out: Path, **options: Any) -> tuple[dict[str, Any], Told]:
    told: Told = []
    options = {"seeds": [0, 1], "workers": 1, **options}
    return run_experiment(Plan(tiny.load, out, **options), told.append), told


def numbers(results: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on how the experiment was run."""

    def without_times(entry: dict[str, Any]) -> dict[str, Any]:
        own = {k: v for k, v in entry["own"].items() if k != "seconds"}
        return {**{k: v for k, v in entry.items() if k != "seconds"}, "own": own}

    arms = {arm: {seed: without_times(e) for seed, e in seeds.items()} for arm, seeds in results["arms"].items()}
    return {"arms": arms, **{key: results[key] for key in ("claims", "intervals", "verdict", "seeds")}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """Two seeds with one worker, uninterrupted."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, *run(out)


def test_starts_are_trained_first_and_the_claim_is_judged(whole: Whole) -> None:
    out, results, told = whole
    done = [(p.arm, p.seed) for p in told if p.kind == "done"]
    assert sorted(done) == [(arm, seed) for arm in ("astray", "start", "target") for seed in (0, 1)]
    for seed in (0, 1):
        assert done.index(("start", seed)) < min(done.index(("astray", seed)), done.index(("target", seed)))
    better, worse = results["claims"]
    assert better["verdict"] == results["verdict"] == "holds"
    assert worse["verdict"] == "does not hold"
    assert results == read_results(out)
    assert results["failures"] == []


def test_arms_start_from_the_last_cast_of_their_start(whole: Whole) -> None:
    arms = whole[1]["arms"]
    for seed in ("0", "1"):
        end = arms["start"][seed]["final"]
        for arm in ("astray", "target"):
            assert arms[arm][seed]["evaluations"][0]["metrics"] == end


def test_costs_of_the_start_are_charged_to_what_starts_from_it(whole: Whole) -> None:
    target = whole[1]["arms"]["target"]["0"]
    assert target["own"]["gradient_steps"] == 24
    assert target["gradient_steps"] == 36
    assert target["rows"] == 36 * 16
    assert target["seconds"] > target["own"]["seconds"]


def test_claim_values_are_paired_within_the_seed(whole: Whole) -> None:
    results = whole[1]
    for seed in ("0", "1"):
        finals = {arm: results["arms"][arm][seed]["final"]["numbers/closeness"] for arm in ("target", "astray")}
        assert results["claims"][0]["values"][seed] == pytest.approx(finals["target"] - finals["astray"])


def test_results_are_strict_json_with_null_for_what_is_absent(whole: Whole) -> None:
    out, results, _ = whole
    assert results["intervals"]["target"]["numbers/absent"] == {"mean": None, "low": None, "high": None}
    assert "NaN" not in (out / "results.json").read_text()
    assert os.uname().nodename not in (out / "results.json").read_text()


def test_two_workers_find_what_one_finds(whole: Whole, tmp_path: Path) -> None:
    results, _ = run(tmp_path / "run", workers=2)
    assert numbers(results) == numbers(whole[1])


def test_a_killed_worker_is_replaced_and_nothing_changes(whole: Whole, tmp_path: Path) -> None:
    out, settings, told, struck = tmp_path / "run", {"pause": "0.02"}, [], []

    def kill_once(progress: Progress) -> None:
        told.append(progress)
        middle = progress.note is not None and progress.note.kind == "step" and progress.note.stage == "second"
        if middle and progress.arm == "target" and not struck:
            saved = list((out / "target" / f"seed{progress.seed}" / "checkpoints").glob("*.safetensors"))
            if saved:
                struck.append(progress)
                multiprocessing.active_children()[0].kill()

    results = run_experiment(Plan(tiny.load, out, seeds=[0, 1], workers=1, overrides=settings), kill_once)
    assert struck
    died = [p for p in told if p.kind == "died"]
    assert len(died) == 1
    assert "SIGKILL" in died[0].text
    assert results["failures"] == []
    assert numbers(results)["arms"] == numbers(whole[1])["arms"]


def test_a_job_whose_process_dies_three_times_is_given_up_and_the_others_are_kept(tmp_path: Path) -> None:
    out, counter = tmp_path / "run", tmp_path / "deaths"
    results, told = run(out, seeds=[0], overrides={"killed": str(counter)})
    assert next(p.text for p in told if p.kind == "died").startswith("killed by SIGKILL; the system may be short")
    assert [(f["arm"], f["seed"]) for f in results["failures"]] == [("target", 0)]
    assert "its process died 3 times" in results["failures"][0]["reason"]
    assert set(results["arms"]["astray"]) == {"0"}
    assert results["claims"][0]["verdict"] == "unclear"
    assert "no result of target" in results["claims"][0]["note"]
    again, _ = run(out, seeds=[0], overrides={"killed": str(counter)}, resume=True)
    assert again["failures"] == []
    assert again["wall_clock_seconds"] > results["wall_clock_seconds"]


def test_a_failing_arm_takes_only_those_that_start_from_it_along(tmp_path: Path) -> None:
    results, _ = run(tmp_path / "run", seeds=[0], arms=["after_broken", "start"])
    reasons = {failure["arm"]: failure["reason"] for failure in results["failures"]}
    assert reasons.keys() == {"broken", "after_broken"}
    assert "this arm is broken; mend it" in reasons["broken"]
    assert "'broken', from which it starts, has failed" in reasons["after_broken"]
    assert "Traceback" in (tmp_path / "run" / "broken" / "seed0" / "output.txt").read_text()
    assert set(results["arms"]["start"]) == {"0"}
    assert [claim["name"] for claim in results["left_out"]] == ["better", "worse"]
    assert results["verdict"] == "unclear"


def test_finished_jobs_are_not_trained_again_and_seeds_can_be_added(whole: Whole, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run(out, seeds=[0])
    stamp = (out / "target" / "seed0" / "result.json").stat().st_mtime_ns
    results, told = run(out, seeds=[1], resume=True)
    assert {p.seed for p in told if p.kind == "done"} == {1}
    assert (out / "target" / "seed0" / "result.json").stat().st_mtime_ns == stamp
    assert numbers(results) == numbers(whole[1])


INTERRUPTED = """
import sys
from pathlib import Path
import tiny
from regimen.lab.runner import ExperimentInterrupted, Plan, run_experiment
if __name__ == "__main__":
    try:
        run_experiment(Plan(tiny.load, Path(sys.argv[1]), seeds=[0, 1], workers=2, overrides={"pause": "0.03"}))
    except ExperimentInterrupted:
        sys.exit(7)
"""


def test_an_interrupted_experiment_goes_on_to_the_same_numbers(whole: Whole, tmp_path: Path) -> None:
    out, program = tmp_path / "run", tmp_path / "program.py"
    program.write_text(INTERRUPTED)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(tiny.__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, str(program), str(out)], env=environment, start_new_session=True, stderr=subprocess.PIPE
    )
    deadline = time.time() + 60
    while not list(out.glob("target/seed*/metrics.jsonl")) and time.time() < deadline:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # As a terminal does: the workers get it too, and must not heed it.
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (7, b"")
    assert not (out / "target" / "seed1" / "result.json").exists()
    results, _ = run(out, resume=True, overrides={"pause": "0.03"})
    assert numbers(results)["arms"] == numbers(whole[1])["arms"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": "defualt"}, "did you mean 'default'"),
        ({"scale": "missing"}, r"pip install 'regimen-rl\[no-such-extra\]'"),
        ({"arms": ["targt"]}, "did you mean 'target'"),
        ({"overrides": {"stpes": "3"}}, "did you mean 'steps'.*knobs are emphasis"),
        ({"overrides": {"steps": "three"}}, "steps=three: expected a value of type int"),
        ({"overrides": {"emphasis": "-1"}}, r"knob 'emphasis'.*-1.0.*\[0.0, inf\]"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused_before_anything_is_written(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ExperimentError, match=message):
        run(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_folder_of_another_experiment_is_refused(whole: Whole, tmp_path: Path) -> None:
    out = whole[0]
    with pytest.raises(ExperimentError, match=r"already holds an experiment.*--resume"):
        run(out)
    with pytest.raises(ExperimentError, match="another scale: default there, quick here"):
        run(out, resume=True, scale="quick")
    with pytest.raises(ExperimentError, match=r"another rate: 0.05 there, 0.1 here"):
        run(out, resume=True, overrides={"rate": "0.1"})
    with pytest.raises(ExperimentError, match=r"another emphasis: absent there, 2.0 here"):
        run(out, resume=True, overrides={"emphasis": "2"})
    copied = tmp_path / "copied"
    copied.mkdir()
    content = json.loads((out / "results.json").read_text())
    content["paper"]["slug"] = "other"
    (copied / "results.json").write_text(json.dumps(content))
    with pytest.raises(ExperimentError, match="another paper: other there, tiny here"):
        run(copied, resume=True)


def test_a_full_disk_is_an_error_that_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, text: str, encoding: str) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"results.json cannot be written: .*No space left on device"):
        run(tmp_path / "run")
