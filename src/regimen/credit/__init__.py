"""Credit: which steps deserve how much of the reward."""

from regimen.credit.base import Credit
from regimen.credit.group_relative import GroupRelativeAdvantage, group_relative

__all__ = ["Credit", "GroupRelativeAdvantage", "group_relative"]
