"""Environments that a policy acts in, many copies at once."""

from regimen.tasks.environments.base import Change, VectorEnv
from regimen.tasks.environments.gymnasium import GymnasiumVector

__all__ = ["Change", "GymnasiumVector", "VectorEnv"]
