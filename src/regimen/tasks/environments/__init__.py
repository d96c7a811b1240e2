"""Environments that a policy acts in, many copies at once."""

from regimen.tasks.environments.base import Change, MakeEnv, VectorEnv
from regimen.tasks.environments.gymnasium import Gymnasium, GymnasiumVector

__all__ = ["Change", "Gymnasium", "GymnasiumVector", "MakeEnv", "VectorEnv"]
