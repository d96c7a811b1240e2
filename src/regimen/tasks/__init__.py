"""Collect: where rollouts come from, and how a policy's work is evaluated."""

from regimen.tasks.base import Evaluation, Task
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.prompts import PromptTask

__all__ = ["DatasetTask", "Evaluation", "PromptTask", "Task"]
