"""Adapt: controllers that move knobs."""

from regimen.controllers.base import Controller, Moment, Situation
from regimen.controllers.curves import Alternating, Constant, Curve, Exponential, Linear, Piecewise, Steps
from regimen.controllers.schedule import Schedule

__all__ = [
    "Alternating",
    "Constant",
    "Controller",
    "Curve",
    "Exponential",
    "Linear",
    "Moment",
    "Piecewise",
    "Schedule",
    "Situation",
    "Steps",
]
