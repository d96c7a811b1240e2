"""Learn: losses that compose by arithmetic and serve every kind of policy."""

from regimen.objectives.base import Batch, Loss, Objective, SumObjective
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective, clipped_surrogate
from regimen.objectives.flow_matching import FlowMatchingObjective, logit_normal
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.supervised import SFTObjective

__all__ = [
    "Batch",
    "ClippedSurrogateObjective",
    "FlowMatchingObjective",
    "Loss",
    "Objective",
    "ReferenceKL",
    "SFTObjective",
    "SumObjective",
    "clipped_surrogate",
    "logit_normal",
]
