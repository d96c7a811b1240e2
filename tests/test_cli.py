"""The command line: what it shows, what it leaves, and that every user's error is one line and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "lab"))
import tiny

from regimen import cli, papers
from regimen.lab import overview
from regimen.lab.results import read_results
from regimen.storage import StorageError

Whole = tuple[Path, str]
QUICK = ("--scale", "quick", "--workers", "1")
TINY = "import tiny; from regimen import cli, papers; papers.load = tiny.load; cli.main()"


@pytest.fixture(autouse=True)
def _empty_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def tiny_paper(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny paper in the place of all others, in worker processes too: they are sent the function by name."""
    monkeypatch.setattr(papers, "load", tiny.load)


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def error(*words: str) -> str:
    """The one line on standard error of a user's error."""
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("regimen: ")
    return lines[0]


def environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}


def start(program: str, *words: str) -> subprocess.Popen[str]:
    """A program that calls the command line, as a process of its own."""
    command, pipe = [sys.executable, "-W", "ignore", "-c", program, *words], subprocess.PIPE
    return subprocess.Popen(command, env=environment(), text=True, stdout=pipe, stderr=pipe, start_new_session=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The folder of a whole run of the tiny paper, and what was shown meanwhile."""
    out = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(papers, "load", tiny.load)
        result = call("run", "tiny", "--seeds", "0,1", "--workers", "1", "--out", str(out))
    assert result.exit_code == 0, result.output
    return out, result.stdout


def without_times(tree: Any) -> Any:
    """Results without what no two runs share."""
    if isinstance(tree, dict):
        return {key: without_times(value) for key, value in tree.items() if "seconds" not in key}
    return [without_times(value) for value in tree] if isinstance(tree, list) else tree


# Papers


def test_help_does_not_import_torch() -> None:
    program = (
        "import sys; from regimen import cli; sys.argv = ['regimen', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    for command in ("papers", "run", "report", "check"):
        assert command in done.stdout


def test_papers_are_listed_with_their_verdicts() -> None:
    shown, markdown = call("papers"), call("papers", "--markdown")
    assert shown.exit_code == markdown.exit_code == 0
    lines = markdown.stdout.splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 6
    assert len(lines) == 2 + len(papers.available())
    for slug, line in zip(papers.available(), lines[2:], strict=True):
        assert slug in shown.stdout
        assert f"`{slug}`" in line
        assert papers.facts(slug)["title"] in line


def test_only_a_whole_run_of_a_real_scale_is_recorded(
    whole: Whole, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(papers, "VERDICTS", tmp_path / "verdicts.json")
    for name, change, message in (
        ("quick", {"scale": "quick"}, "is no evidence for a verdict: its scale is 'quick'"),
        ("changed", {"changed": {"rate": 1.0}}, "its changed settings are rate"),
        ("part", {"left_out": [{"name": "better", "judged": True}]}, "its judged claims with gaps: better"),
    ):
        Path(name).mkdir()
        Path(name, "results.json").write_text(json.dumps(read_results(whole[0]) | change))
        assert message in error("papers", "--update", name)
    Path("empty").mkdir()
    assert "holds no experiment" in error("papers", "--update", "empty")
    assert papers.verdicts() == {}
    assert call("papers", "--update", str(whole[0])).exit_code == 0
    assert papers.verdicts()["tiny"]["verdict"] == "holds"
    assert papers.verdicts()["tiny"]["seeds"] == [0, 1]


def test_claims_and_costs_of_all_papers_are_printed(whole: Whole) -> None:
    shown = call("papers", "--results").stdout
    for slug, entry in papers.verdicts().items():
        assert shown.count(f"| `{slug}` |") == len(entry["claims"]) + len(entry["spent"])
    digest = overview.digest(read_results(whole[0]))
    rows = [seed["gradient_steps"] for seed in read_results(whole[0])["arms"]["target"].values()]
    title = read_results(whole[0])["paper"]["arms"]["target"]["title"]
    assert digest["spent"][title]["gradient_steps"] == sum(rows) / len(rows) > 0


# Run and report


def test_all_papers_are_run_into_one_table_and_gone_on_with(
    tiny_paper: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(papers, "available", lambda: ["one", "two"])
    first = call("run", "--all", *QUICK, "--out", "all")
    assert first.exit_code == 0, first.output
    table = Path("all/overview.md").read_text()
    assert "| `one` |" in table
    assert "| `two` |" in table
    assert json.loads(Path("all/overview.json").read_text()).keys() == {"one", "two"}
    trained = Path("all/one/target/seed0/metrics.jsonl")
    before = trained.stat().st_mtime_ns
    again = call("run", "--all", *QUICK, "--out", "all")
    assert again.exit_code == 0, again.output
    assert trained.stat().st_mtime_ns == before
    assert Path("all/overview.md").read_text() == table


def test_all_papers_are_run_as_they_are(tiny_paper: None) -> None:
    assert "expected the name of a paper (see 'regimen papers'), or --all" in error("run")
    assert "or --all" in error("run", "tiny", "--all")
    assert "with --all every paper is run as it is" in error("run", "--all", "--set", "steps=3")


def test_a_run_shows_its_verdict_and_leaves_results_and_a_report(whole: Whole) -> None:
    out, shown = whole
    assert "tiny: holds" in shown
    assert f"report: {out}/report.html" in shown
    content = read_results(out)
    for arm in ("start", "astray", "target"):
        for seed in ("0", "1"):
            entry = content["arms"][arm][seed]
            assert entry["final"].keys() == {"numbers/closeness", "numbers/slope"}
            assert entry["samples"] == 0
            assert entry["rows"] == 16 * entry["gradient_steps"] > 0
            assert entry["seconds"] > 0
        assert content["intervals"][arm]["numbers/slope"]["low"] <= content["intervals"][arm]["numbers/slope"]["high"]
    assert content["claims"][0]["low"] > 0
    assert content["claims"][0]["verdict"] == content["verdict"] == "holds"


def test_a_report_made_anew_is_the_same(whole: Whole) -> None:
    page = whole[0] / "report.html"
    before = page.read_text()
    page.unlink()
    assert call("report", str(whole[0])).stdout.strip() == str(page)
    assert page.read_text() == before


def test_settings_and_knobs_are_changed_by_name(tiny_paper: None) -> None:
    result = call("run", "tiny", *QUICK, "--set", "steps=3", "--set", "emphasis=0.5", "--arms", "start,")
    assert result.exit_code == 0, result.output
    content = read_results(Path("runs/tiny-quick"))
    assert content["changed"] == {"steps": 3, "emphasis": 0.5}
    assert content["arms"]["start"]["0"]["gradient_steps"] == 3
    assert content["arms"].keys() == {"start"}


def test_a_failing_arm_is_told_with_its_reason_and_exit_code_1(tiny_paper: None) -> None:
    result = call("run", "tiny", *QUICK, "--arms", "start,after_broken", "--out", "run")
    assert result.exit_code == 1
    line = result.stderr.strip()
    assert "2 of 3 runs failed, the first of them broken seed 0: ValueError: this arm is broken; mend it" in line
    assert "--resume" in line
    assert Path("run/report.html").exists()


def test_a_folder_with_blanks_and_brackets_is_shown_as_it_is(tiny_paper: None) -> None:
    result = call("run", "tiny", *QUICK, "--arms", "start", "--out", "my runs/[red]one")
    assert result.exit_code == 0, result.output
    assert "report: my runs/[red]one/report.html" in result.stdout
    assert call("report", "my runs/[red]one").exit_code == 0


def test_more_workers_than_jobs_are_no_trouble(tiny_paper: None) -> None:
    assert call("run", "tiny", "--scale", "quick", "--arms", "start", "--workers", "9").exit_code == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--scale", "defualt"], "tiny has no scale 'defualt'; did you mean 'default'? There are: quick, default, mi"),
        (["--scale", "missing"], "needs no-such-extra, which is not installed: pip install"),
        (["--arms", "targt"], "tiny has no arm 'targt'; did you mean 'target'? There are: start, astray, target"),
        (["--arms", ""], "no arm of tiny is named; expected some of start, astray, target"),
        (["--arms", " , "], "no arm of tiny is named"),
        (["--seeds", "3-1"], "--seeds 3-1: '3-1' is no seed or range; expected a text like 0-4 or 7,8,9"),
        (["--seeds", ""], "'' is no seed or range"),
        (["--seeds", "1,,2"], "'' is no seed or range"),
        (["--seeds", "-1"], "'-1' is no seed or range"),
        (["--seeds", "0-99999999"], "'0-99999999' is over 1000 seeds; expected fewer"),
        (["--set", "stpes=3"], "--set stpes=...: no setting or knob has that name; did you mean 'steps'?"),
        (["--set", "stpes=3"], "The settings are steps, rate, pause, killed; the knobs are emphasis"),
        (["--set", "emphasys=3"], "did you mean 'emphasis'?"),
        (["--set", "steps"], "--set steps: expected name=value"),
        (["--set", "=3"], "--set =3: expected name=value"),
        (["--set", "steps=many"], "--set steps=many: expected a value of type int"),
        (["--set", "rate=nan"], "--set rate=nan: expected a value of type float"),
        (["--set", "emphasis=-1"], "knob 'emphasis': the regimen's own setting gave -1.0, expected a finite number in"),
        (["--set", "\x1b[31m\n=1"], r"--set \x1b[31m=...: no setting or knob has that name"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_be_is_refused_and_nothing_is_written(
    tiny_paper: None, words: list[str], message: str
) -> None:
    assert message in error("run", "tiny", *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("slug", "message"),
    [
        ("unipic", "there is no paper 'unipic'; did you mean 'unipic2'?"),
        ("UniPic2", "did you mean 'unipic2'?"),
        ("../unipic2", "there is no paper '../unipic2'"),
        ("__init__", "there is no paper '__init__'"),
        ("", "there is no paper ''"),
        ("uni\x1b[31mpic\n2", r"there is no paper 'uni\x1b[31mpic 2'"),
        ("uni\udce9pic2", r"there is no paper 'uni\udce9pic2'"),
    ],
)
def test_an_unknown_paper_is_answered_with_the_nearest(slug: str, message: str) -> None:
    line = error("run", slug)
    assert message in line
    assert line.endswith(", ".join(papers.available()))


@pytest.mark.parametrize("name", ["", "  ", "a\tb", "\x1b[31m", "\udce9"])
def test_a_folder_without_a_printable_name_is_refused(name: str) -> None:
    for words in (["run", "unipic2", "--out", name], ["report", name]):
        result = call(*words)
        assert result.exit_code == 2
        assert "is no name for a folder" in result.stderr
    assert not list(Path().iterdir())


def test_a_paper_for_another_machine_is_refused_before_it_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    line = error("run", "unipic2", "--scale", "scenes", "--set", "noise_level=0.5")
    assert "these settings train on device 'cuda', and this machine has 0 CUDA devices" in line
    assert "device 'gpu' is none that torch knows" in error("run", "unipic2", "--set", "device=gpu")
    assert "--set world=moon: expected one of digits, scenes, stable_diffusion" in error(
        "run", "unipic2", "--set", "world=moon"
    )
    assert not Path("runs").exists()


def test_a_folder_of_another_run_is_refused(tiny_paper: None) -> None:
    words = ("run", "tiny", *QUICK, "--arms", "start", "--out", "run")
    assert call(*words).exit_code == 0
    assert "run already holds an experiment; continue it with --resume, or choose another --out" in error(*words)
    assert "another steps: 4 there, 5 here; resume with the same" in error(*words, "--resume", "--set", "steps=5")
    assert "another emphasis: absent there, 0.5 here" in error(*words, "--resume", "--set", "emphasis=0.5")
    done = call(*words, "--resume")
    assert done.exit_code == 0
    assert "1 runs, 1 of them finished before" in done.stdout
    Path("run/results.json").unlink()
    assert "run has no results.json, so that nobody can say with which settings run/start/seed0 was trained" in error(
        *words
    )


def test_a_start_whose_folder_is_gone_is_trained_again(tiny_paper: None, whole: Whole) -> None:
    shutil.copytree(whole[0], "run")
    shutil.rmtree("run/start")
    words = ("run", "tiny", "--seeds", "0,1", "--workers", "1", "--out", "run", "--resume")
    done = call(*words)
    assert done.exit_code == 0, done.output
    assert "6 runs, 4 of them finished before" in done.stdout
    assert read_results(Path("run"))["claims"] == read_results(whole[0])["claims"]


def test_a_report_of_what_is_left_of_a_folder(whole: Whole) -> None:
    Path("left").mkdir()
    shutil.copy(whole[0] / "results.json", "left")
    assert call("report", "left").exit_code == 0


def test_a_folder_that_cannot_be_written_is_refused(tiny_paper: None) -> None:
    Path("file").write_text("")
    for out in ("file", "file/run", "/proc/run"):
        assert f"{out} cannot be written: [Errno" in error("run", "tiny", *QUICK, "--out", out)


def test_a_disk_that_is_full_from_the_start_is_one_clear_line(
    tiny_paper: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(number: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    line = error("run", "tiny", *QUICK, "--arms", "start", "--out", "run")
    assert line.endswith(
        "results.json cannot be written: [Errno 28] No space left on device; free some room or choose another folder"
    )
    assert [path.name for path in Path("run").iterdir()] == [".lock"]


def test_a_job_that_cannot_write_is_told_and_a_resume_goes_on(tiny_paper: None) -> None:
    words = ("run", "tiny", *QUICK, "--arms", "target")
    call(*words, "--out", "whole")
    Path("cut/target/seed0/metrics.jsonl").mkdir(parents=True)  # What is no file cannot be appended to.
    result = call(*words, "--out", "cut")
    assert result.exit_code == 1
    assert "1 of 2 runs failed, the first of them target seed 0: StorageError: " in result.stderr
    assert "cannot be written: [Errno 21] Is a directory" in result.stderr
    Path("cut/target/seed0/metrics.jsonl").rmdir()
    assert call(*words, "--out", "cut", "--resume").exit_code == 0
    whole, cut = (read_results(Path(name)) for name in ("whole", "cut"))
    assert without_times(whole) == without_times(cut)


def test_a_report_that_cannot_be_made_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("empty").mkdir()
    Path("broken").mkdir()
    Path("broken/results.json").write_text('{"version": 1')
    for folder in ("empty", "nowhere"):
        assert f"{folder} holds no experiment: it has no results.json; make one with 'regimen run" in error(
            "report", folder
        )
    assert "broken/results.json cannot be read: Expecting" in error("report", "broken")

    def full(folder: Path) -> Path:
        raise StorageError(f"{folder} cannot be written: no room")

    monkeypatch.setattr("regimen.lab.report.write_report", full)
    assert error("report", "empty") == "regimen: empty cannot be written: no room"


def test_ctrl_c_leaves_a_run_that_resume_continues_to_the_same_numbers(tiny_paper: None, whole: Whole) -> None:
    words = ["run", "tiny", "--seeds", "0", "--arms", "target", "--set", "pause=0.03", "--workers", "1"]
    process = start(TINY, *words, "--out", "cut")
    deadline = time.monotonic() + 60
    while not list(Path("cut").glob("target/seed0/checkpoints/*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.01)
    during = call("report", "cut")
    assert during.exit_code == 0, during.output
    assert "another process is at work in cut; wait for it or stop it first" in error(
        *words, "--out", "cut", "--resume"
    )
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors.strip().startswith("regimen: stopped; what was trained is kept. Continue with: regimen run tiny")
    assert errors.strip().endswith("--out cut --resume")
    assert not Path("cut/target/seed0/result.json").exists()
    assert call(*words, "--out", "cut", "--resume").exit_code == 0
    untroubled, cut = (without_times(read_results(path))["arms"] for path in (whole[0], Path("cut")))
    assert cut == {arm: {"0": untroubled[arm]["0"]} for arm in ("start", "target")}


def test_a_reader_that_leaves_early_is_no_error() -> None:
    process = start("from regimen import cli; cli.main()", "papers", "--markdown")
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors
    assert "regimen:" not in errors


# Check


def test_check_tells_what_passes_and_what_fails() -> None:
    text = """
import torch
from regimen.rewards import reward_from

@reward_from
def good(rollout):
    return rollout["image"].flatten(1).mean(1)

@reward_from
def bad(rollout):
    return torch.zeros(len(rollout), 9)  # [bold] brackets
"""
    Path("parts.py").write_text(text)
    result = call("check", "parts.py")
    assert result.exit_code == 1
    lines = " ".join(result.stdout.split())
    assert "passes good (FunctionReward 'good')" in lines
    assert "fails bad (FunctionReward 'bad')" in lines
    assert "score returned shape [6, 9], expected [6] (one number per sample)" in lines
    assert "2 parts, 1 with failures" in lines
    Path("parts.py").write_text(text.split("@reward_from\ndef bad")[0])
    assert call("check", "parts.py").exit_code == 0


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("parts.py", "stage = Stage(\n", "parts.py cannot be imported: SyntaxError at line 1: '(' was never closed"),
        ("parts.py", "import no_such_module", "ModuleNotFoundError at line 1: No module named 'no_such_module'"),
        ("parts.py", "x = 1", "parts.py defines no part that can be checked"),
        ("parts.txt", "x = 1", "parts.txt cannot be imported: ImportError: its name does not end with .py"),
        ("folder.py/", None, "folder.py is not a file; expected a Python file with parts to check"),
        ("nowhere.py", None, "nowhere.py is not a file"),
    ],
)
def test_a_file_that_cannot_be_checked_is_one_clear_line(name: str, text: str | None, message: str) -> None:
    if name.endswith("/"):
        Path(name).mkdir()
    elif text is not None:
        Path(name).write_text(text)
    assert message in error("check", name)


def test_an_experiment_in_a_file_of_ones_own_runs_like_a_paper_in_worker_processes(tmp_path: Path) -> None:
    file = tmp_path / "my_lines.py"
    shutil.copy(tiny.__file__, file)
    words = ["run", str(file), "--scale", "quick", "--seeds", "0,1", "--workers", "2"]
    done = subprocess.run(
        [sys.executable, "-c", "from regimen import cli; cli.main()", *words],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = read_results(tmp_path / "runs" / "my_lines-quick")
    assert results["verdict"] == "holds"
    assert not results["failures"]


def test_a_file_without_an_experiment_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "no_paper_here.py").write_text("PAPER = 3\n")
    (tmp_path / "breaks_at_once.py").write_text("import no_such_module_anywhere\n")
    (tmp_path / "json.py").write_text("")
    assert "defines no PAPER = Paper(...), but int" in error("run", "no_paper_here.py")
    assert "ModuleNotFoundError: No module named 'no_such_module_anywhere'" in error("run", "breaks_at_once.py")
    assert "has the name of another module" in error("run", "json.py")
    assert "is not a file" in error("run", "absent.py")
