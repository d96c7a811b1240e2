"""The command line: every user's error is one line and exit code 2."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parent / "lab"))
import tiny

from regimen import cli, papers

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The tiny paper in the place of all others, and an empty folder to work in."""
    real = papers.load
    monkeypatch.setattr(papers, "load", lambda slug: tiny.PAPER if slug == "tiny" else real(slug))
    monkeypatch.setattr(cli, "partial", lambda function, slug: tiny.load, raising=False)
    monkeypatch.chdir(tmp_path)


def call(*words: str) -> Result:
    return CliRunner().invoke(cli.app, list(words))


def error(result: Result) -> str:
    """The one line on standard error of a user's error."""
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("regimen: ")
    return lines[0]


def test_help_is_fast_and_does_not_import_torch() -> None:
    program = (
        "import sys; from regimen import cli; sys.argv = ['regimen', '--help']\n"
        "try: cli.main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    )
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert "papers" in done.stdout
    assert time.perf_counter() - started < 3.0


def environment() -> Mapping[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
