"""Learn: losses that compose by arithmetic and serve every kind of policy."""

from regimen.objectives.base import Batch, Loss, Objective, SumObjective
from regimen.objectives.clipped_surrogate import ClippedSurrogateObjective, clipped_surrogate
from regimen.objectives.destinations import (
    DestinationObjective,
    DiversityObjective,
    best_of_k,
    pairwise_repulsion,
)
from regimen.objectives.distillation import FeatureDistillation, feature_distance
from regimen.objectives.dpo import DPOObjective, dpo_loss
from regimen.objectives.dqn import DQNObjective
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.flow_matching import FlowMatchingObjective, logit_normal
from regimen.objectives.implicit_value import AdvantageWeightedObjective, ImplicitValueObjective, expectile_loss
from regimen.objectives.inverse_dynamics import InverseDynamicsObjective
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.regression import RegressionObjective
from regimen.objectives.reinforce import ReinforceObjective
from regimen.objectives.shorthands import grpo, iql, ppo, sac
from regimen.objectives.soft_actor import SoftActorObjective, TemperatureObjective
from regimen.objectives.supervised import SFTObjective
from regimen.objectives.td import TDObjective, td_loss
from regimen.objectives.value import ValueObjective, value_loss
from regimen.objectives.variational_preference import VariationalPreferenceObjective, preference_nll

__all__ = [
    "AdvantageWeightedObjective",
    "Batch",
    "ClippedSurrogateObjective",
    "DPOObjective",
    "DQNObjective",
    "DestinationObjective",
    "DiversityObjective",
    "EntropyBonus",
    "FeatureDistillation",
    "FlowMatchingObjective",
    "ImplicitValueObjective",
    "InverseDynamicsObjective",
    "Loss",
    "Objective",
    "ReferenceKL",
    "RegressionObjective",
    "ReinforceObjective",
    "SFTObjective",
    "SoftActorObjective",
    "SumObjective",
    "TDObjective",
    "TemperatureObjective",
    "ValueObjective",
    "VariationalPreferenceObjective",
    "best_of_k",
    "clipped_surrogate",
    "dpo_loss",
    "expectile_loss",
    "feature_distance",
    "grpo",
    "iql",
    "logit_normal",
    "pairwise_repulsion",
    "ppo",
    "preference_nll",
    "sac",
    "td_loss",
    "value_loss",
]
