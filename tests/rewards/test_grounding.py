"""What was possible, and what the environment gave in all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from regimen.rewards import GroundingReward, OutcomeReward, Scene, judge
from regimen.rollout import Rollout


def acted(valid: Any = None, **fields: Any) -> Rollout:
    mask = torch.tensor([[True, True, True, False]])
    columns = {"env_reward": torch.tensor([[0.25, 0.0, 0.5, 9.0]])}
    columns |= {} if valid is None else {"valid": torch.tensor([valid])}
    return Rollout.create(task="shop", group=torch.zeros(1).long(), mask=mask, step_columns=columns, **fields)


def test_what_was_possible_is_a_bonus_or_what_was_not_a_penalty() -> None:
    rollout = acted([1.0, 0.0, 1.0, 1.0])
    assert GroundingReward("bonus").score(rollout, Scene()).tolist() == [[1.0, 0.0, 1.0, 0.0]]
    assert GroundingReward().score(rollout, Scene()).tolist() == [[0.0, -1.0, 0.0, 0.0]]


def test_a_turn_is_judged_once_and_where_its_reward_stands() -> None:
    rollout = acted([0.0, 1.0, 0.0, 0.0], segment=torch.tensor([[0, 0, 1, 1]]))
    assert GroundingReward("bonus").score(rollout, Scene()).tolist() == [[0.0, 1.0, 0.0, 0.0]]
    assert GroundingReward().score(rollout, Scene()).tolist() == [[0.0, 0.0, -1.0, 0.0]]


def test_an_environment_that_does_not_tell_is_named() -> None:
    rollout, report = judge(GroundingReward(), acted(), Scene())
    assert "GroundingReward needs a column 'valid' [1, 4] of the rollout of task shop" in report.errors[0]
    assert not bool(rollout.loss_mask.any())


def test_an_unknown_form_is_named() -> None:
    with pytest.raises(ValueError, match="form 'malus' is not one of penalty, bonus"):
        GroundingReward("malus")  # type: ignore[arg-type]


def test_the_outcome_is_all_that_was_given_and_stands_at_the_end() -> None:
    judged, _ = judge(OutcomeReward(), acted(), Scene())
    assert judged.reward.tolist() == [0.75]


def test_an_environment_that_failed_has_no_outcome() -> None:
    judged, report = judge(OutcomeReward(), acted(columns={"failure": ["it broke"]}), Scene())
    assert report.failed == 1
    assert report.errors[0] == "it broke"
    assert not bool(judged.loss_mask.any())
