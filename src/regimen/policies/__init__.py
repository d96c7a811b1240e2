"""Policies: anything that can sample and, where possible, score its samples."""

from regimen.policies.base import Policy, StepDistribution, logprob
from regimen.policies.flow import Denoiser, FlowPolicy, GaussianSteps

__all__ = ["Denoiser", "FlowPolicy", "GaussianSteps", "Policy", "StepDistribution", "logprob"]
