"""Memory: what stands between credit and learn."""

from regimen.memory.base import Memory, NewestRollout
from regimen.memory.hold_out import HoldOut
from regimen.memory.questions import QuestionMemory
from regimen.memory.replay import ReplayMemory

__all__ = ["HoldOut", "Memory", "NewestRollout", "QuestionMemory", "ReplayMemory"]
