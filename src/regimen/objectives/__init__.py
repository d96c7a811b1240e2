"""Learn: losses that compose by arithmetic and serve every kind of policy."""

from regimen.objectives.base import Batch, Loss, Objective, SumObjective
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective, clipped_surrogate
from regimen.objectives.dpo import DPOObjective, dpo_loss
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.flow_matching import FlowMatchingObjective, logit_normal
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.shorthands import grpo, ppo
from regimen.objectives.supervised import SFTObjective
from regimen.objectives.value import ValueObjective, value_loss

__all__ = [
    "Batch",
    "ClippedSurrogateObjective",
    "DPOObjective",
    "EntropyBonus",
    "FlowMatchingObjective",
    "Loss",
    "Objective",
    "ReferenceKL",
    "SFTObjective",
    "SumObjective",
    "ValueObjective",
    "clipped_surrogate",
    "dpo_loss",
    "grpo",
    "logit_normal",
    "ppo",
    "value_loss",
]
