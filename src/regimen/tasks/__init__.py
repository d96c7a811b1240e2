"""Collect: where rollouts come from, and how a policy's work is evaluated."""

from regimen.tasks.base import Evaluation, Task
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.dialogue import DialogueTask
from regimen.tasks.env import EnvTask
from regimen.tasks.environments import Gymnasium, GymnasiumVector, VectorEnv
from regimen.tasks.parallel import ParallelTask
from regimen.tasks.partners import DialogueEnv, OneByOne, Partner, Reply, Tool, WithTools
from regimen.tasks.prompts import PromptTask

__all__ = [
    "DatasetTask",
    "DialogueEnv",
    "DialogueTask",
    "EnvTask",
    "Evaluation",
    "Gymnasium",
    "GymnasiumVector",
    "OneByOne",
    "ParallelTask",
    "Partner",
    "PromptTask",
    "Reply",
    "Task",
    "Tool",
    "VectorEnv",
    "WithTools",
]
