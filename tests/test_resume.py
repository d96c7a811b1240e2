"""A run that is killed and resumed is the run that was never killed, bit for bit."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from regimen.runs import read_metrics
from regimen.storage import load_tree

PROGRAM = Path(__file__).with_name("resume_program.py")


def start(out: Path, mode: str, pause: float = 0.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(PROGRAM), str(out), mode, str(pause)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()


def lines(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def kill_at(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    """SIGKILL once the run has logged `count` records."""
    deadline = time.time() + 120
    while lines(out) < count:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.time() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()


def metrics(out: Path) -> list[dict[str, object]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in read_metrics(out / "metrics.jsonl")]


def assert_same_tree(a: object, b: object, at: str = "") -> None:
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor)
        assert torch.equal(a, b), at
    elif isinstance(a, dict):
        assert isinstance(b, dict)
        assert a.keys() == b.keys()
        for key in a:
            if key not in ("seconds", "metrics_bytes"):
                assert_same_tree(a[key], b[key], f"{at}/{key}")
    elif isinstance(a, list | tuple):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same_tree(x, y, f"{at}[{i}]")
    else:
        assert a == b, at


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(out, "new"))
    return out


def test_killed_three_times_equals_uninterrupted(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    total = lines(uninterrupted)
    chosen = random.Random(os.environ.get("REGIMEN_KILL_SEED", time.time_ns()))
    kills = sorted(chosen.sample(range(2, total - 2), 3))
    for number, count in enumerate(kills):
        kill_at(start(out, "resume" if number else "new", pause=0.01), out, count)
    finish(start(out, "resume"))
    assert metrics(out) == metrics(uninterrupted), f"killed at records {kills}"
    newest = [sorted((run / "checkpoints").iterdir())[-1] for run in (out, uninterrupted)]
    assert_same_tree(load_tree(newest[0]), load_tree(newest[1]))


def test_truncated_checkpoint_falls_back_to_the_one_before(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    kill_at(start(out, "new", pause=0.01), out, 20)
    newest = sorted((out / "checkpoints").glob("*.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[: newest.stat().st_size // 2])
    process = start(out, "resume")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors.decode()
    assert metrics(out) == metrics(uninterrupted)


@pytest.mark.parametrize("times", [1, 2], ids=["once", "twice at the same time"])
def test_terminated_run_saves_its_last_step(tmp_path: Path, times: int) -> None:
    out = tmp_path / "run"
    process = start(out, "new", pause=0.02)
    deadline = time.time() + 60
    while lines(out) < 8 and time.time() < deadline:
        time.sleep(0.002)
    for _ in range(times):
        process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode != 0
    steps = [record for record in read_metrics(out / "metrics.jsonl") if record["kind"] == "step"]
    saved = load_tree(sorted((out / "checkpoints").iterdir())[-1])
    assert saved["counters"]["iterations"] == steps[-1]["iterations"]
    json.loads((out / "config.json").read_text())
