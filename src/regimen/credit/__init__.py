"""Credit: which steps deserve how much of the reward."""

from regimen.credit.base import Credit
from regimen.credit.gae import GAE
from regimen.credit.group_relative import GroupRelativeAdvantage, group_relative
from regimen.credit.n_step import NStepReturn
from regimen.credit.pairs import BestWorstPairSelector

__all__ = ["GAE", "BestWorstPairSelector", "Credit", "GroupRelativeAdvantage", "NStepReturn", "group_relative"]
