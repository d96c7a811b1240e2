"""Policies: anything that can sample and, where possible, score its samples."""

from regimen.policies.action import Acted, ActionPolicy, ActionSteps, CategoricalHead, GaussianHead
from regimen.policies.base import Policy, StepDistribution, logprob
from regimen.policies.flow import Denoiser, FlowPolicy, GaussianSteps
from regimen.policies.q_policy import QPolicy
from regimen.policies.token import TokenPolicy, TokenSteps
from regimen.policies.uniform import UniformPolicy
from regimen.policies.vision import Processor, QwenVLImages

__all__ = [
    "Acted",
    "ActionPolicy",
    "ActionSteps",
    "CategoricalHead",
    "Denoiser",
    "FlowPolicy",
    "GaussianHead",
    "GaussianSteps",
    "Policy",
    "Processor",
    "QPolicy",
    "QwenVLImages",
    "StepDistribution",
    "TokenPolicy",
    "TokenSteps",
    "UniformPolicy",
    "logprob",
]
