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
from regimen.rewards.counts import CountBonus, row_key, value_variance
from regimen.rewards.distillation import NovelDBonus, RandomDistillationBonus
from regimen.rewards.elliptical import EllipticalBonus, elliptical_step
from regimen.rewards.endpoint import EndpointReward
from regimen.rewards.environment import EnvironmentReward
from regimen.rewards.images import ClassifierReward, EditReward
from regimen.rewards.isolated import IsolatedReward
from regimen.rewards.judge import JudgeReport, judge
from regimen.rewards.model import ModelReward
from regimen.rewards.normalized import NormalizedReward
from regimen.rewards.programs import ProgramReward
from regimen.rewards.sandbox import Limits, Outcome, run_limited, run_python
from regimen.rewards.variational import VariationalReward, WinProbabilityReward, win_probability

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "SCORED",
    "ClassifierReward",
    "CountBonus",
    "EditReward",
    "EllipticalBonus",
    "EndpointReward",
    "EnvironmentReward",
    "Expression",
    "FirstApplicable",
    "FunctionReward",
    "IsolatedReward",
    "JudgeReport",
    "Judgement",
    "Limits",
    "ModelReward",
    "NormalizedReward",
    "NovelDBonus",
    "Outcome",
    "ProgramReward",
    "RandomDistillationBonus",
    "Reward",
    "Scene",
    "Score",
    "VariationalReward",
    "WinProbabilityReward",
    "at_last_step",
    "elliptical_step",
    "judge",
    "reward_from",
    "row_key",
    "run_limited",
    "run_python",
    "value_variance",
    "win_probability",
]
