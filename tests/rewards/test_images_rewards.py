"""Rewards on images."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from regimen.functions import closeness
from regimen.rewards import ClassifierReward, EditReward, Scene
from regimen.rollout import Rollout


def test_classifier_reward_is_the_probability_of_what_was_asked(tiny_rollout: Callable[..., Rollout]) -> None:
    probabilities = torch.tensor([[0.9, 0.1]]).repeat(6, 1)
    reward = ClassifierReward(lambda images: probabilities, name="judge")
    scores = reward.score(tiny_rollout(), Scene())
    assert reward.name == "judge"
    assert scores.tolist() == pytest.approx([0.9, 0.9, 0.1, 0.1, 0.9, 0.9])


def test_edit_reward_is_closeness_to_the_target(tiny_rollout: Callable[..., Rollout]) -> None:
    rollout = tiny_rollout()
    target = torch.zeros_like(rollout["image"])
    scores = EditReward(lambda _: target, scale=2.0).score(rollout, Scene())
    torch.testing.assert_close(scores, closeness(rollout["image"], target, 2.0))
    assert EditReward(lambda r: r["image"]).score(rollout, Scene()).tolist() == [1.0] * 6
