"""Collect: where rollouts come from, and how a policy's work is evaluated."""

from regimen.tasks.base import Evaluation, Task
from regimen.tasks.conditioned import Conditioned, StoredUsers
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.dialogue import DialogueTask
from regimen.tasks.env import EnvTask
from regimen.tasks.environments import Gymnasium, GymnasiumVector, VectorEnv
from regimen.tasks.parallel import ParallelTask
from regimen.tasks.partners import DialogueEnv, OneByOne, Partner, Reply, Tool, WithTools
from regimen.tasks.prompts import PromptTask
from regimen.tasks.queries import QueryTask, query_information, select_queries

__all__ = [
    "Conditioned",
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
    "QueryTask",
    "Reply",
    "StoredUsers",
    "Task",
    "Tool",
    "VectorEnv",
    "WithTools",
    "query_information",
    "select_queries",
]
