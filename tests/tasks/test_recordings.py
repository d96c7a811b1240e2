"""Recorded steps as rows: ends and cuts, what a data set task makes of them, and Minari's data."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import gymnasium.spaces as spaces
import numpy as np
import pytest
import torch

from regimen.cast import Cast
from regimen.loop import train
from regimen.models import MLPTorso, QNetwork, ValueNetwork
from regimen.objectives import ChiSquare, iql
from regimen.policies.action import ActionPolicy
from regimen.policies.heads import GaussianHead
from regimen.policies.uniform import UniformPolicy
from regimen.regimen import Regimen, Stage
from regimen.rewards import EnvironmentReward
from regimen.rollout import Rollout
from regimen.tasks import (
    DatasetTask,
    EnvTask,
    Gymnasium,
    minari_environment,
    minari_transitions,
    transition_rows,
    transitions,
)
from regimen.update import Update

NAME, TABLES = "regimen/line-v0", "regimen/table-v0"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:minari.*")  # Of authors and descriptions.
with_minari = pytest.mark.skipif(importlib.util.find_spec("minari") is None, reason="needs minari")


# Rollouts


def test_every_step_is_a_row_and_ends_are_told_from_cuts(rng: torch.Generator) -> None:
    make = Gymnasium("CartPole-v1", settings={"max_episode_steps": 12})
    task = EnvTask("poles", make, copies=8, steps=40, episodes=True, discount=None, member="random")
    rollout = task.collect({"random": UniformPolicy(task.spaces[1])}, {}, rng, 8)
    rows = transitions(rollout)
    assert len(rows) == int(rollout.mask.sum())
    ended = rows["discount"][:, 0] == 0
    fallen = rollout.lengths < 12
    assert int(ended.sum()) == int(fallen.sum())
    assert 0 < int(fallen.sum()) < 8
    assert torch.equal(rows["observations"][1, 0], rows["step_columns", "next_observations"][0, 0])
    assert rows["step_columns", "env_reward"].unique().tolist() == [1.0]


def test_a_data_set_task_reads_them(rng: torch.Generator) -> None:
    seen = torch.arange(5.0)[:, None]
    rows = transition_rows(seen, 10 * seen, torch.tensor([1.0, 1, 1, 1, 0]), seen + 1, torch.arange(5.0))
    rollout = DatasetTask("data", rows, order="sequential").collect({}, {"temperature": 1.0}, rng, 5)
    assert rollout.observations.flatten().tolist() == [0, 1, 2, 3, 4]
    assert rollout["next_observations"].flatten().tolist() == [1, 2, 3, 4, 5]
    assert rollout.discount.flatten().tolist() == [1, 1, 1, 1, 0]
    assert rollout["env_reward"].flatten().tolist() == [0, 1, 2, 3, 4]
    assert rollout.mask.all()


def test_rows_need_no_rewards(rng: torch.Generator) -> None:
    seen = torch.zeros(3, 2)
    rollout = DatasetTask("data", transition_rows(seen, seen, torch.ones(3), seen)).collect({}, {}, rng, 2)
    assert rollout.get("env_reward") is None


def test_a_rollout_without_observations_is_refused() -> None:
    rollout = Rollout.create(task="texts", group=torch.arange(2), mask=torch.ones(2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"rollout of task texts holds no observations.*EnvTask"):
        transitions(rollout)


# Minari


TABLE = spaces.Dict({"at": spaces.Box(-9, 9, (1,)), "goal": spaces.Box(-9, 9, (2,), np.float64)})


@pytest.fixture
def stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two data sets under a folder of Minari's: vectors of Pendulum, and tables."""
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import minari
    from minari.data_collector import EpisodeBuffer

    def episode(number: int, steps: int, terminates: bool, table: bool) -> EpisodeBuffer:
        count = np.arange(steps + 1, dtype=np.float64) + 100 * number
        last = np.arange(steps) == steps - 1
        vectors = np.stack([count, -count, count], 1).astype(np.float32)
        tables = {"at": vectors[:, :1], "goal": np.stack([count, count], 1)}
        return EpisodeBuffer(
            id=number,
            observations=tables if table else vectors,
            actions=np.full((steps, 1), 0.5, np.float32),
            rewards=list(-count[:steps]),
            terminations=list(last & terminates),
            truncations=list(last & (not terminates)),
        )

    box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    for name, table, settings in (
        (NAME, False, {"env": "Pendulum-v1", "observation_space": box}),
        (TABLES, True, {"observation_space": TABLE, "action_space": spaces.Box(-1, 1, (1,))}),
    ):
        episodes = [episode(0, 3, True, table), episode(1, 2, False, table)]
        minari.create_dataset_from_buffers(name, episodes, **settings)
    return tmp_path


@with_minari
def test_a_stored_data_set_becomes_transitions(stored: Path) -> None:
    rows = minari_transitions(NAME)
    assert len(rows) == 5
    assert rows["observations"][:, 0, 0].tolist() == [0, 1, 2, 100, 101]
    assert rows["step_columns", "next_observations"][:, 0, 0].tolist() == [1, 2, 3, 101, 102]
    assert rows["discount"].flatten().tolist() == [1, 1, 0, 1, 1]  # The second episode is cut off.
    assert rows["step_columns", "env_reward"].flatten().tolist() == [0, -1, -2, -100, -101]
    assert rows["actions"].dtype == rows["observations"].dtype == torch.float32


@with_minari
def test_dictionaries_become_tables_in_single_precision(stored: Path) -> None:
    rows = minari_transitions(TABLES)
    assert rows["observations", "at"].shape == (5, 1, 1)
    assert rows["observations", "goal"].dtype == torch.float32
    assert rows["step_columns", "next_observations", "goal"][:, 0, 1].tolist() == [1, 2, 3, 101, 102]


@with_minari
def test_offline_control_learns_from_it_and_is_tried_in_its_environment(stored: Path) -> None:
    task = EnvTask("control", minari_environment(NAME), copies=2, evaluation_episodes=2, evaluation_steps=3)
    seen, actions = task.spaces
    cast = Cast(
        policy=ActionPolicy(MLPTorso(3, (8,)), GaussianHead(8, 1)),
        critic=QNetwork.for_spaces(seen, actions, widths=(8,)),
        value=ValueNetwork(MLPTorso(3, (8,))),
        critic_target=QNetwork.for_spaces(seen, actions, widths=(8,)),
    )
    update = Update(iql(f=ChiSquare(), discount=0.9), ["value", "policy", "critic"])
    data = DatasetTask("data", minari_transitions(NAME), order="random")
    stage = Stage("offline", [data], 2, 4, EnvironmentReward(), updates=[update])
    outcome = train(Regimen(cast, [stage], evaluations=[task]), listener=lambda event: None)
    assert outcome.counters.gradient_steps == 2
    assert outcome.evaluations[-1]["metrics"]["control/length"] == 3


@with_minari
def test_a_data_set_that_is_not_there_is_an_error_that_says_how_to_get_it(stored: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no data set 'regimen/other-v0'.*minari download regimen/other-v0"):
        minari_transitions("regimen/other-v0")


def test_without_minari_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"'any-v0' needs minari: pip install 'regimen-rl\[minari\]'"):
        minari_transitions("any-v0")
