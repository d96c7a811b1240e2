"""Memory: what stands between credit and learn."""

from regimen.memory.base import Memory, NewestRollout
from regimen.memory.replay import ReplayMemory

__all__ = ["Memory", "NewestRollout", "ReplayMemory"]
