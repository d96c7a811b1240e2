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
from regimen.rewards.endpoint import EndpointReward
from regimen.rewards.environment import EnvironmentReward
from regimen.rewards.images import ClassifierReward, EditReward
from regimen.rewards.isolated import IsolatedReward
from regimen.rewards.judge import JudgeReport, judge
from regimen.rewards.programs import ProgramReward
from regimen.rewards.sandbox import Limits, Outcome, run_limited, run_python

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "SCORED",
    "ClassifierReward",
    "EditReward",
    "EndpointReward",
    "EnvironmentReward",
    "Expression",
    "FirstApplicable",
    "FunctionReward",
    "IsolatedReward",
    "JudgeReport",
    "Judgement",
    "Limits",
    "Outcome",
    "ProgramReward",
    "Reward",
    "Scene",
    "Score",
    "at_last_step",
    "judge",
    "reward_from",
    "run_limited",
    "run_python",
]
