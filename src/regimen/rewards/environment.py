"""The reward that the environment gave while the samples were collected."""

from __future__ import annotations

import torch

from regimen.rewards.base import FAILED, SCORED, Reward, Scene, Score
from regimen.rewards.text import field_of
from regimen.rollout import Rollout


class EnvironmentReward(Reward):
    """What the environment gave at each step, `[B, T]`, component `environment`.

    It reads the column `env_reward [B, T]`. Where there is a column `failure` of texts, samples with a text have
    failed, for the reason that it tells.
    """

    def __init__(self, column: str = "env_reward", name: str = "environment") -> None:
        """Make the reward.

        Args:
            column: where the reward stands.
            name: of the component.
        """
        self.column, self.name = column, name

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The column, failed where the environment did."""
        value = rollout[self.column]
        if "failure" not in rollout.columns.keys():  # noqa: SIM118
            return Score.of(value)
        why = field_of(rollout, "failure")
        status = torch.tensor([FAILED if text else SCORED for text in why], dtype=torch.uint8, device=value.device)
        return Score(value, status, tuple(dict.fromkeys(text for text in why if text))[:5])


class OutcomeReward(Reward):
    """All that the environment gave in a sample, `[B]`, component `outcome`: it is learned of at the end only.

    It reads the column `env_reward [B, T]`.
    """

    def __init__(self, column: str = "env_reward", name: str = "outcome") -> None:
        """Make the reward.

        Args:
            column: where the reward stands.
            name: of the component.
        """
        self.given = EnvironmentReward(column, name)
        self.name = name

    def score(self, rollout: Rollout, scene: Scene) -> Score:
        """The column summed over steps, failed where the environment did."""
        score = self.given.score(rollout, scene)
        assert isinstance(score, Score)
        return Score(torch.where(rollout.mask, score.value, 0).sum(1), score.status, score.errors)
