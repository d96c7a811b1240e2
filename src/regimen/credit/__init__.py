"""Credit: which steps deserve how much of the reward."""

from regimen.credit.base import Credit
from regimen.credit.critic_advantage import CriticAdvantage, critic_advantage
from regimen.credit.gae import GAE
from regimen.credit.group_relative import GroupRelativeAdvantage, group_relative
from regimen.credit.hindsight import HindsightValues, hindsight_values
from regimen.credit.n_step import NStepReturn
from regimen.credit.pairs import BestWorstPairSelector, PairsPerObjective
from regimen.credit.redistribution import RewardRedistribution
from regimen.credit.selection import PassRateSelector

__all__ = [
    "GAE",
    "BestWorstPairSelector",
    "Credit",
    "CriticAdvantage",
    "GroupRelativeAdvantage",
    "HindsightValues",
    "NStepReturn",
    "PairsPerObjective",
    "PassRateSelector",
    "RewardRedistribution",
    "critic_advantage",
    "group_relative",
    "hindsight_values",
]
