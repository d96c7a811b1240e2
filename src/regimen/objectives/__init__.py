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
from regimen.objectives.double_critic import DoubleCriticObjective, double_critic_loss
from regimen.objectives.dpo import DPOObjective, dpo_loss
from regimen.objectives.dqn import DQNObjective
from regimen.objectives.entropy import EntropyBonus
from regimen.objectives.flow_matching import FlowMatchingObjective, logit_normal
from regimen.objectives.implicit_value import AdvantageWeightedObjective, ImplicitValueObjective
from regimen.objectives.inverse_dynamics import InverseDynamicsObjective
from regimen.objectives.maximisers import (
    ChiSquare,
    Expectile,
    Gumbel,
    Maximiser,
    TotalVariation,
    chi_square_conjugate,
    expectile_loss,
    gumbel_loss,
    surrogate_loss,
)
from regimen.objectives.pairwise_verdict import PairwiseVerdictObjective
from regimen.objectives.recoil import ReCOILCriticObjective, recoil_critic_loss
from regimen.objectives.reference_kl import ReferenceKL
from regimen.objectives.regression import RegressionObjective
from regimen.objectives.reinforce import ReinforceObjective
from regimen.objectives.resampled import Resampled
from regimen.objectives.return_decomposition import ReturnDecompositionObjective, return_decomposition_loss
from regimen.objectives.reward_backprop import RewardBackpropObjective
from regimen.objectives.shorthands import grpo, iql, ppo, sac
from regimen.objectives.soft_actor import SoftActorObjective, TemperatureObjective
from regimen.objectives.supervised import SFTObjective
from regimen.objectives.td import TDObjective, td_loss
from regimen.objectives.value import ValueObjective, value_loss
from regimen.objectives.variational_preference import VariationalPreferenceObjective, preference_nll

__all__ = [
    "AdvantageWeightedObjective",
    "Batch",
    "ChiSquare",
    "ClippedSurrogateObjective",
    "DPOObjective",
    "DQNObjective",
    "DestinationObjective",
    "DiversityObjective",
    "DoubleCriticObjective",
    "EntropyBonus",
    "Expectile",
    "FeatureDistillation",
    "FlowMatchingObjective",
    "Gumbel",
    "ImplicitValueObjective",
    "InverseDynamicsObjective",
    "Loss",
    "Maximiser",
    "Objective",
    "PairwiseVerdictObjective",
    "ReCOILCriticObjective",
    "ReferenceKL",
    "RegressionObjective",
    "ReinforceObjective",
    "Resampled",
    "ReturnDecompositionObjective",
    "RewardBackpropObjective",
    "SFTObjective",
    "SoftActorObjective",
    "SumObjective",
    "TDObjective",
    "TemperatureObjective",
    "TotalVariation",
    "ValueObjective",
    "VariationalPreferenceObjective",
    "best_of_k",
    "chi_square_conjugate",
    "clipped_surrogate",
    "double_critic_loss",
    "dpo_loss",
    "expectile_loss",
    "feature_distance",
    "grpo",
    "gumbel_loss",
    "iql",
    "logit_normal",
    "pairwise_repulsion",
    "ppo",
    "preference_nll",
    "recoil_critic_loss",
    "return_decomposition_loss",
    "sac",
    "surrogate_loss",
    "td_loss",
    "value_loss",
]
