"""The environment's own reward as a component."""

from __future__ import annotations

import pytest
import torch

from regimen.rewards import EnvironmentReward, Scene, judge
from regimen.rollout import Rollout

PAID = torch.tensor([[0.0, 1.0, 5.0], [2.0, 0.0, -1.0]])


def rollout_of(**columns: object) -> Rollout:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    return Rollout.create(task="walk", group=torch.arange(2), mask=mask, columns={"env_reward": PAID, **columns})


def test_it_is_what_was_paid_at_each_step() -> None:
    judged, report = judge(EnvironmentReward(), rollout_of(), Scene())
    assert judged.reward.tolist() == [[0, 1, 0], [2, 0, -1]]
    assert report.counts == {("walk", "environment"): (2, 0, 0)}


def test_samples_that_failed_are_failed_with_their_reason() -> None:
    judged, report = judge(EnvironmentReward(), rollout_of(failure=["", "it broke"]), Scene())
    assert report.failed == 1
    assert report.errors == ("it broke",)
    assert judged.loss_mask.any(1).tolist() == [True, False]
    assert judged.reward.tolist() == [[0, 1, 0], [0, 0, 0]]


def test_another_column_under_another_name() -> None:
    reward = EnvironmentReward("paid", name="wage") - 0.5 * EnvironmentReward()
    judged, _ = judge(
        reward, rollout_of(paid=torch.ones(2, 3)), Scene(knobs={"weight/wage": 1, "weight/environment": 0.5})
    )
    assert judged.reward.tolist() == [[1, 0.5, 0], [0, 1, 1.5]]


def test_a_rollout_without_it_says_what_it_has() -> None:
    bare = Rollout.create(task="walk", group=torch.arange(2), mask=torch.ones(2, 3, dtype=torch.bool))
    _, report = judge(EnvironmentReward(), bare, Scene())
    assert report.failed == 2
    assert "has no column 'env_reward'; it has: none" in report.errors[0]


@pytest.mark.parametrize("rows", [[0], [1], [1, 0]])
def test_rows_are_scored_alike_in_any_batch(rows: list[int]) -> None:
    whole = rollout_of(failure=["", "it broke"])
    score = EnvironmentReward().score(whole[torch.tensor(rows)], Scene())
    assert torch.equal(score.status, EnvironmentReward().score(whole, Scene()).status[rows])
