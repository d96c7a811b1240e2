"""Success at any step of an episode: worked numbers, stretches of several episodes, and what a controller reads."""

from __future__ import annotations

import torch
from torch import Tensor

from regimen.checkers import check
from regimen.rewards import EnvironmentReward, SuccessReward, judge, success_share
from regimen.rewards.base import Scene
from regimen.rollout import Rollout


def flags(*rows: list[int]) -> Tensor:
    return torch.tensor(rows)


def test_success_at_any_step_counts_once() -> None:
    """Per-step flags (0,1,0) and (0,0,0): one episode of two."""
    told, starts = flags([0, 1, 0], [0, 0, 0]), flags([1, 0, 0], [1, 0, 0]).bool()
    assert success_share(told, starts, torch.ones(2, 3, dtype=torch.bool)).mean() == 0.5
    assert success_share(flags([0, 1, 1]), starts[:1], torch.ones(1, 3, dtype=torch.bool)).tolist() == [1.0]


def test_two_episodes_in_one_sample_are_half_a_success() -> None:
    told, starts = flags([0, 1, 0, 0, 0, 0]), flags([1, 0, 0, 1, 0, 0]).bool()
    assert success_share(told, starts, torch.ones(1, 6, dtype=torch.bool)).tolist() == [0.5]


def test_an_episode_that_is_under_way_at_first_counts() -> None:
    told, starts = flags([1, 0, 0, 0], [0, 0, 0, 1]), flags([0, 0, 1, 0], [0, 0, 1, 0]).bool()
    assert success_share(told, starts, torch.ones(2, 4, dtype=torch.bool)).tolist() == [0.5, 0.5]


def test_steps_that_do_not_exist_do_not_succeed() -> None:
    told, starts = flags([0, 0, 1, 1]), flags([1, 0, 1, 0]).bool()
    assert success_share(told, starts, flags([1, 1, 0, 0]).bool()).tolist() == [0.0]


def test_it_is_logged_and_does_not_train() -> None:
    columns = {"env_reward": torch.ones(2, 3), "success": flags([0, 1, 0], [0, 0, 0]).float()}
    rollout = Rollout.create(
        task="door",
        group=torch.zeros(2, dtype=torch.int64),
        mask=torch.ones(2, 3, dtype=torch.bool),
        step_columns=columns,
    )
    reward = EnvironmentReward() + SuccessReward().logged()
    judged, _ = judge(reward, rollout, Scene({}, {knob.name: knob.default for knob in reward.knobs}))
    assert judged.rewards["success"].tolist() == [1.0, 0.0]
    assert torch.equal(judged.reward, columns["env_reward"])


def test_it_keeps_the_rules_of_rewards() -> None:
    columns = {"success": torch.zeros(6, 3)}
    rollout = Rollout.create(task="a", group=torch.arange(6) // 2, mask=torch.ones(6, 3).bool(), step_columns=columns)
    assert check(SuccessReward(), rollout).messages == []
