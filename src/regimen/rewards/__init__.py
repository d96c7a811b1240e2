"""Judge: rewards that compose by arithmetic, are seen, and fail honestly."""

from regimen.rewards.base import (
    FAILED,
    NOT_APPLICABLE,
    SCORED,
    Expression,
    FirstApplicable,
    FunctionReward,
    Judgement,
    Reward,
    Scene,
    Score,
    at_last_step,
    reward_from,
)
from regimen.rewards.images import ClassifierReward, EditReward
from regimen.rewards.isolated import IsolatedReward
from regimen.rewards.judge import JudgeReport, judge

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "SCORED",
    "ClassifierReward",
    "EditReward",
    "Expression",
    "FirstApplicable",
    "FunctionReward",
    "IsolatedReward",
    "JudgeReport",
    "Judgement",
    "Reward",
    "Scene",
    "Score",
    "at_last_step",
    "judge",
    "reward_from",
]
