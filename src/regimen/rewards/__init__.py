"""Judge: rewards that compose by arithmetic, are seen, and fail honestly."""

from regimen.rewards.base import (
    FAILED,
    NOT_APPLICABLE,
    SCORED,
    Expression,
    FirstApplicable,
    FunctionReward,
    Judgement,
    MeanReward,
    Reward,
    Scene,
    Score,
    at_last_step,
    reward_from,
)
from regimen.rewards.chance import ChanceReward
from regimen.rewards.counts import CountBonus, row_key, value_variance
from regimen.rewards.distillation import NovelDBonus, RandomDistillationBonus
from regimen.rewards.elliptical import EllipticalBonus, elliptical_step
from regimen.rewards.endpoint import EndpointReward
from regimen.rewards.environment import EnvironmentReward, OutcomeReward
from regimen.rewards.grounding import GroundingReward
from regimen.rewards.images import ClassifierReward, EditReward
from regimen.rewards.isolated import IsolatedReward
from regimen.rewards.judge import JudgeReport, judge
from regimen.rewards.model import ModelReward
from regimen.rewards.normalized import NormalizedReward
from regimen.rewards.pairwise import PairwiseReward
from regimen.rewards.programs import ProgramReward
from regimen.rewards.questions import PassRate, ProposerReward, QuestionDiversity, QuestionGuard
from regimen.rewards.sandbox import Limits, Outcome, run_limited, run_python
from regimen.rewards.success import SuccessReward, success_share
from regimen.rewards.transport import OptimalTransportReward
from regimen.rewards.variational import VariationalReward, WinProbabilityReward, win_probability

__all__ = [
    "FAILED",
    "NOT_APPLICABLE",
    "SCORED",
    "ChanceReward",
    "ClassifierReward",
    "CountBonus",
    "EditReward",
    "EllipticalBonus",
    "EndpointReward",
    "EnvironmentReward",
    "Expression",
    "FirstApplicable",
    "FunctionReward",
    "GroundingReward",
    "IsolatedReward",
    "JudgeReport",
    "Judgement",
    "Limits",
    "MeanReward",
    "ModelReward",
    "NormalizedReward",
    "NovelDBonus",
    "OptimalTransportReward",
    "Outcome",
    "OutcomeReward",
    "PairwiseReward",
    "PassRate",
    "ProgramReward",
    "ProposerReward",
    "QuestionDiversity",
    "QuestionGuard",
    "RandomDistillationBonus",
    "Reward",
    "Scene",
    "Score",
    "SuccessReward",
    "VariationalReward",
    "WinProbabilityReward",
    "at_last_step",
    "elliptical_step",
    "judge",
    "reward_from",
    "row_key",
    "run_limited",
    "run_python",
    "success_share",
    "value_variance",
    "win_probability",
]
