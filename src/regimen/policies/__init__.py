"""Policies: anything that can sample and, where possible, score its samples."""

from regimen.policies.acting import Acted
from regimen.policies.action import ActionPolicy, ActionSteps
from regimen.policies.base import Policy, StepDistribution, logprob
from regimen.policies.flow import Denoiser, FlowPolicy, GaussianSteps
from regimen.policies.forecast import (
    DestinationForecaster,
    Destinations,
    ForecastSteps,
    NextPositionForecaster,
    TrajectoryForecaster,
)
from regimen.policies.guided import GuidedDecoding
from regimen.policies.heads import CategoricalHead, GaussianHead
from regimen.policies.multi_head import MultiHeadPolicy
from regimen.policies.q_policy import QPolicy
from regimen.policies.token import TokenPolicy
from regimen.policies.token_steps import TokenSteps
from regimen.policies.uniform import UniformPolicy
from regimen.policies.utterances import UtterancePolicy, UtteranceSteps, as_token_steps, utterance_steps
from regimen.policies.vision import Processor, QwenVLImages

__all__ = [
    "Acted",
    "ActionPolicy",
    "ActionSteps",
    "CategoricalHead",
    "Denoiser",
    "DestinationForecaster",
    "Destinations",
    "FlowPolicy",
    "ForecastSteps",
    "GaussianHead",
    "GaussianSteps",
    "GuidedDecoding",
    "MultiHeadPolicy",
    "NextPositionForecaster",
    "Policy",
    "Processor",
    "QPolicy",
    "QwenVLImages",
    "StepDistribution",
    "TokenPolicy",
    "TokenSteps",
    "TrajectoryForecaster",
    "UniformPolicy",
    "UtterancePolicy",
    "UtteranceSteps",
    "as_token_steps",
    "logprob",
    "utterance_steps",
]
