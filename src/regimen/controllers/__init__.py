"""Adapt: controllers that move knobs."""

from regimen.controllers.base import Controller, Insight, Moment, Needs, Probe, Situation
from regimen.controllers.curves import Alternating, Constant, Cosine, Curve, Exponential, Linear, Piecewise, Steps
from regimen.controllers.discount import (
    AutomaticDiscountScheduler,
    discount_from_progress,
    longest_increasing_subsequence,
    match_score,
)
from regimen.controllers.meta_gradient import MetaGradientWeight, TargetEntropy, meta_gradient, mixed_weight_step
from regimen.controllers.mixture import TaskMixture
from regimen.controllers.phases import Phase, Phases
from regimen.controllers.schedule import Schedule

__all__ = [
    "Alternating",
    "AutomaticDiscountScheduler",
    "Constant",
    "Controller",
    "Cosine",
    "Curve",
    "Exponential",
    "Insight",
    "Linear",
    "MetaGradientWeight",
    "Moment",
    "Needs",
    "Phase",
    "Phases",
    "Piecewise",
    "Probe",
    "Schedule",
    "Situation",
    "Steps",
    "TargetEntropy",
    "TaskMixture",
    "discount_from_progress",
    "longest_increasing_subsequence",
    "match_score",
    "meta_gradient",
    "mixed_weight_step",
]
