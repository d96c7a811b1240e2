"""Learn: losses that compose by arithmetic and serve every kind of policy."""

from regimen.objectives.base import Batch, Loss, Objective, SumObjective
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective, clipped_surrogate
from regimen.objectives.distillation import FeatureDistillation, feature_distance
from regimen.objectives.dpo import DPOObjective, dpo_loss
from regimen.objectives.dqn import DQNObjective
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.flow_matching import FlowMatchingObjective, logit_normal
from regimen.objectives.inverse_dynamics import InverseDynamicsObjective
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.reinforce import ReinforceObjective
from regimen.objectives.shorthands import grpo, ppo, sac
from regimen.objectives.soft_actor import SoftActorObjective, TemperatureObjective
from regimen.objectives.supervised import SFTObjective
from regimen.objectives.td import TDObjective, td_loss
from regimen.objectives.value import ValueObjective, value_loss

__all__ = [
    "Batch",
    "ClippedSurrogateObjective",
    "DPOObjective",
    "DQNObjective",
    "EntropyBonus",
    "FeatureDistillation",
    "FlowMatchingObjective",
    "InverseDynamicsObjective",
    "Loss",
    "Objective",
    "ReferenceKL",
    "ReinforceObjective",
    "SFTObjective",
    "SoftActorObjective",
    "SumObjective",
    "TDObjective",
    "TemperatureObjective",
    "ValueObjective",
    "clipped_surrogate",
    "dpo_loss",
    "feature_distance",
    "grpo",
    "logit_normal",
    "ppo",
    "sac",
    "td_loss",
    "value_loss",
]
