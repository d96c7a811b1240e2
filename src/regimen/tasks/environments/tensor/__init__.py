"""Environments written as batched tensors: a step of thousands of copies costs about as much as one of a few."""

from regimen.tasks.environments.tensor.base import TensorEnv
from regimen.tasks.environments.tensor.corridors import Corridors
from regimen.tasks.environments.tensor.gridworld import GridWorld
from regimen.tasks.environments.tensor.mazes import Mazes, spanning_tree
from regimen.tasks.environments.tensor.pool import TaskPool
from regimen.tasks.environments.tensor.user_square import UserSquare
from regimen.tasks.environments.tensor.walk import Walk

__all__ = ["Corridors", "GridWorld", "Mazes", "TaskPool", "TensorEnv", "UserSquare", "Walk", "spanning_tree"]
