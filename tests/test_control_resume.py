"""A run of control that broke down in the middle of episodes, resumed, is the run that never did: bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from control_worlds import Clock, Mixed
from regimen import Cast, Epochs, Event, Knob, Regimen, Stage, Update, train
from regimen.controllers import Linear, Schedule
from regimen.credit import GAE
from regimen.models import ValueHead, ValueNetwork, torso_for
from regimen.objectives import ppo
from regimen.policies import ActionPolicy
from regimen.rewards import EnvironmentReward
from regimen.runs import read_metrics
from regimen.storage import load_tree
from regimen.tasks import EnvTask, Gymnasium, GymnasiumVector, ParallelTask
from regimen.tasks.environments.tensor import GridWorld

LENGTH = Knob("length", 3, 1, 100, integer=True)


def clocks(count: int) -> GymnasiumVector:
    return GymnasiumVector([Clock] * count, reads=[LENGTH])


def mixed(count: int) -> GymnasiumVector:
    return GymnasiumVector([Mixed] * count)


WORLDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "cartpole": (Gymnasium("CartPole-v1"), {}),
    "processes": (Gymnasium("CartPole-v1", processes=True), {}),
    "pendulum": (Gymnasium("Pendulum-v1", {"max_episode_steps": 25}), {"squash": True}),
    "table, with memory": (mixed, {"recurrent": 4}),
    "grid": (partial(GridWorld, lines=["S..", ".#.", "..G"], limit=15), {}),
    "a knob that moves": (clocks, {}),
    "whole episodes": (Gymnasium("CartPole-v1"), {"recurrent": 4}),
    "two that collect": (Gymnasium("CartPole-v1"), {}),
}


def task_of(kind: str, worker: int = 0) -> EnvTask:
    whole = kind == "whole episodes"
    return EnvTask(
        "control", WORLDS[kind][0], copies=3, steps=20 if whole else 7, episodes=whole, evaluation_episodes=2
    )


def regimen_of(kind: str) -> Regimen:
    settings, one = WORLDS[kind][1], task_of(kind)
    task = ParallelTask(partial(task_of, kind)) if kind == "two that collect" else one
    torch.manual_seed(0)
    policy = ActionPolicy.for_spaces(*one.spaces, widths=(8,), **settings)
    reads = "policy" if "recurrent" in settings else None
    critic = ValueHead(4) if reads else ValueNetwork(torso_for(one.spaces[0], (8,)))
    update = Update(ppo(reads=reads), ["policy", "critic"], batches=Epochs(2, 2, "sample" if reads else "step"))
    moved = {"a knob that moves": "length", "grid": "slip"}.get(kind)
    stage = Stage(
        "control", [task], steps=9, batch_size=6, reward=EnvironmentReward(), credit=GAE(reads=reads),
        updates=[update], controllers=[Schedule(moved, Linear(9 if moved == "length" else 0.9, 1, 9))] if moved else [],
        evaluate_every=4,
    )  # fmt: skip
    return Regimen(Cast(policy=policy, critic=critic), [stage])


class Broken(Exception):
    pass


def break_at(step: int) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.kind == "step" and event.step == step:
            raise Broken

    return listen


def run(kind: str, out: Path, **options: Any) -> None:
    listener = options.pop("listener", lambda event: None)
    train(regimen_of(kind), seed=3, out=out, listener=listener, checkpoint_every=2, **options)


def told(out: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in record.items() if k != "time"} for record in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("kind", WORLDS)
def test_a_broken_run_resumed_is_the_unbroken_one(kind: str, tmp_path: Path) -> None:
    run(kind, tmp_path / "whole")
    for step in (1, 6):
        with pytest.raises(Broken):
            run(kind, tmp_path / "broken", resume=True, listener=break_at(step))
    run(kind, tmp_path / "broken", resume=True)
    assert told(tmp_path / "broken") == told(tmp_path / "whole")
    ours, theirs = (load_tree(tmp_path / name / "cast-control.safetensors") for name in ("broken", "whole"))
    for member, weights in ours["members"].items():
        assert all(torch.equal(value, theirs["members"][member][name]) for name, value in weights.items())


def test_the_same_seed_gives_the_same_run_and_another_another(tmp_path: Path) -> None:
    run("cartpole", tmp_path / "first")
    run("cartpole", tmp_path / "second")
    train(regimen_of("cartpole"), seed=4, out=tmp_path / "third", listener=lambda event: None)
    assert told(tmp_path / "first") == told(tmp_path / "second") != told(tmp_path / "third")
