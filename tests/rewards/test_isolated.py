"""A reward in a child process: hangs, crashes and hogs are failures, and the next batch is judged all the same."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from regimen.checkers import check
from regimen.knobs import Knob, Knobs
from regimen.rewards import FAILED, SCORED, IsolatedReward, Reward, Scene, judge
from regimen.rewards.limits import LimitReached, time_limit
from regimen.rollout import Rollout

Build = Callable[..., Rollout]


class Odd(Reward):
    """Does what the rollout's first prompt says."""

    name = "odd"
    reads = (Knob("scale", 2.0),)

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        word = rollout.context["prompt"][0]
        if word == "loop":
            while True:
                pass
        if word == "sleep":
            subprocess.Popen(["sleep", "60"])
            time.sleep(60)
        if word == "exit":
            os._exit(3)
        if word == "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
        if word == "raise":
            raise KeyError("colour")
        if word == "hog":
            return torch.ones(len(rollout), 400_000_000).sum(1)
        if word == "print":
            sys.stderr.write("to the parent's screen")
        if word == "cast":
            return scene.cast["policy"]
        if word == "nan":
            return torch.full((len(rollout),), torch.nan)
        return rollout["image"].flatten(1).sum(1) * scene.knobs["scale"]


class Counting(Reward):
    """Remembers how many samples it has seen."""

    name, stateful = "counting", True

    def __init__(self) -> None:
        self.seen = 0

    def score(self, rollout: Rollout, scene: Scene) -> Tensor:
        if rollout.context["prompt"][0] == "exit":
            os._exit(1)
        self.seen += len(rollout)
        return torch.full((len(rollout),), float(self.seen))

    def save_state(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state(self, state: Any) -> None:
        self.seen = state["seen"]


@pytest.fixture(scope="module")
def shared() -> Iterator[IsolatedReward]:
    """One isolated reward for the module: starting a child takes seconds."""
    reward = IsolatedReward(Odd(), timeout_s=1.0, memory_mb=300)
    yield reward
    reward.close()


@pytest.fixture
def says(tiny_rollout: Build) -> Callable[[str], Rollout]:
    return lambda word: tiny_rollout(context={"prompt": [word] * 6})


def asked(reward: Reward, rollout: Rollout) -> tuple[list[int], str]:
    judged, report = judge(reward, rollout, Scene(knobs=Knobs.of(reward)))
    return judged.status[reward.name].tolist(), " ".join(report.errors)


def test_answers_are_those_of_the_reward_itself(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    rollout = says("fine")
    scene = Scene(knobs=Knobs.of(shared, scale=3.0))
    torch.testing.assert_close(shared.score(rollout, scene).value, Odd().score(rollout, scene), rtol=0, atol=0)
    assert shared.name == "odd"
    assert shared.knobs == Odd.reads
    assert asked(shared, says("nan"))[0] == [FAILED] * 6


def test_exception_travels_and_the_child_lives_on(
    shared: IsolatedReward, says: Callable[[str], Rollout], tiny_rollout: Build
) -> None:
    rollout = tiny_rollout(context={"prompt": ["raise", "raise", *["fine"] * 4]})
    statuses, errors = asked(shared, rollout)
    assert statuses == [FAILED, FAILED, SCORED, SCORED, SCORED, SCORED]
    assert errors == "reward 'odd' raised RuntimeError: in its child process: KeyError: 'colour'"
    child = shared._child
    assert "KeyError" in asked(shared, says("cast"))[1]
    assert shared._child is child


def test_memory_hog_is_refused_memory(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    statuses, errors = asked(shared, says("hog"))
    assert statuses == [FAILED] * 6
    assert "it may take 300 MB, raise memory_mb" in errors
    assert asked(shared, says("fine"))[0] == [SCORED] * 6


def test_endless_loop_is_killed_and_the_next_batch_judged(
    shared: IsolatedReward, says: Callable[[str], Rollout]
) -> None:
    asked(shared, says("fine"))
    started = time.monotonic()
    statuses, errors = asked(shared, says("loop"))
    assert time.monotonic() - started < 5
    assert statuses == [FAILED] * 6
    assert errors == "reward 'odd' did not return within 1 s and was killed; raise timeout_s or mend what hangs"
    assert asked(shared, says("fine"))[0] == [SCORED] * 6


def test_programs_that_the_child_started_go_with_it(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    asked(shared, says("fine"))
    assert shared._child is not None
    group = shared._child.process.pid
    assert asked(shared, says("sleep"))[0] == [FAILED] * 6
    assert not running_in_group(group)


def test_exit_is_a_failure(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    statuses, errors = asked(shared, says("exit"))
    assert statuses == [FAILED] * 6
    assert "reward 'odd' did not return: its process ended with exit code 3; look for exit calls" in errors


def test_crash_is_a_failure_and_nothing_reaches_the_screen(
    shared: IsolatedReward, says: Callable[[str], Rollout], capfd: pytest.CaptureFixture[str]
) -> None:
    asked(shared, says("print"))
    statuses, errors = asked(shared, says("segfault"))
    assert statuses == [FAILED] * 6
    assert "was killed by SIGSEGV" in errors
    assert capfd.readouterr().err == ""


def test_time_limit_of_the_stage_ends_the_child_too(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    asked(shared, says("fine"))
    assert shared._child is not None
    group = shared._child.process.pid
    scene = Scene(knobs=Knobs.of(shared), timeout_s=0.2)
    score = shared.judge(says("loop"), scene).components["odd"]
    assert score.errors == ("reward 'odd' did not return within 0.2 s",)
    assert shared._child is None
    assert not running_in_group(group)


def test_state_lives_on_through_a_kill_and_a_checkpoint(says: Callable[[str], Rollout]) -> None:
    reward = IsolatedReward(Counting(), timeout_s=5.0)
    try:
        assert float(reward.score(says("fine"), Scene()).value[0]) == 6
        assert asked(reward, says("exit"))[0] == [FAILED] * 6
        assert float(reward.score(says("fine"), Scene()).value[0]) == 12
        assert reward.save_state() == {"seen": 12}
        reward.load_state({"seen": 100})
        assert float(reward.score(says("fine"), Scene()).value[0]) == 106
    finally:
        reward.close()


def test_passes_the_checker(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    result = check(shared, says("fine"))
    assert result.ok, str(result)


def test_closed_children_are_gone(shared: IsolatedReward, says: Callable[[str], Rollout]) -> None:
    asked(shared, says("fine"))
    assert shared._child is not None
    group = shared._child.process.pid
    shared.close()
    assert not running_in_group(group)


def test_child_ends_when_its_parent_is_killed() -> None:
    program = (
        "import operator, time, torch\n"
        "from regimen.rewards import FunctionReward, IsolatedReward, Scene\n"
        "from regimen.rollout import Rollout\n"
        "if __name__ == '__main__':\n"
        "    rollout = Rollout.create(task='a', group=torch.arange(2), mask=torch.ones(2, 1, dtype=torch.bool))\n"
        "    reward = IsolatedReward(FunctionReward(operator.attrgetter('group'), 'number'))\n"
        "    assert reward.score(rollout, Scene()).value.tolist() == [0, 1]\n"
        "    print(reward._child.process.pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while running_in_group(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running_in_group(child)


def test_what_cannot_be_sent_is_refused_at_once() -> None:
    class Local(Reward):
        def score(self, rollout: Rollout, scene: Scene) -> Tensor:
            return torch.zeros(len(rollout))

    with pytest.raises(ValueError, match="cannot be sent to a child process.*top level of an importable module"):
        IsolatedReward(Local())
    for limits in ({"timeout_s": 0.0}, {"memory_mb": 0}):
        with pytest.raises(ValueError, match="expected above 0"):
            IsolatedReward(Odd(), **limits)  # type: ignore[arg-type]


def test_time_limit_by_itself() -> None:
    with time_limit(None, "nothing"):
        pass
    with pytest.raises(LimitReached, match="the body did not return within 0.05 s"), time_limit(0.05, "the body"):
        time.sleep(5)
    with pytest.raises(LimitReached), time_limit(0.05, "it"), contextlib.suppress(TimeoutError):
        time.sleep(5)


def running_in_group(group: int | None) -> bool:
    """Whether any process of a group is alive (a zombie is not)."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return any(row[0] == str(group) and not row[1].startswith("Z") for row in rows)
