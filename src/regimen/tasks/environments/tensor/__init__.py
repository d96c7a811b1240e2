"""Environments written as batched tensors: a step of thousands of copies costs about as much as one of a few."""

from regimen.tasks.environments.tensor.base import TensorEnv
from regimen.tasks.environments.tensor.checklist import Checklist, points_and_actions
from regimen.tasks.environments.tensor.corridors import Corridors
from regimen.tasks.environments.tensor.gridworld import GridWorld
from regimen.tasks.environments.tensor.mazes import Mazes, spanning_tree
from regimen.tasks.environments.tensor.pendulum import Pendulum, SwingUp
from regimen.tasks.environments.tensor.pool import TaskPool
from regimen.tasks.environments.tensor.progress_chain import ProgressChain
from regimen.tasks.environments.tensor.user_square import UserSquare
from regimen.tasks.environments.tensor.walk import Walk
from regimen.tasks.environments.tensor.workshop import Workshop, expert_episodes

__all__ = [
    "Checklist",
    "Corridors",
    "GridWorld",
    "Mazes",
    "Pendulum",
    "ProgressChain",
    "SwingUp",
    "TaskPool",
    "TensorEnv",
    "UserSquare",
    "Walk",
    "Workshop",
    "expert_episodes",
    "points_and_actions",
    "spanning_tree",
]
