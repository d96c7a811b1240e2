"""Collect: where rollouts come from, and how a policy's work is evaluated."""

from regimen.tasks.attribution import AttributionTest
from regimen.tasks.base import Evaluation, Task
from regimen.tasks.conditioned import Conditioned, StoredUsers
from regimen.tasks.dataset import DatasetTask
from regimen.tasks.dialogue import DialogueTask
from regimen.tasks.dual_play import DualPlayTask, QuestionReview
from regimen.tasks.env import EnvTask
from regimen.tasks.environments import Gymnasium, GymnasiumVector, VectorEnv
from regimen.tasks.parallel import ParallelTask
from regimen.tasks.partners import DialogueEnv, OneByOne, Partner, Reply, Tool, WithTools
from regimen.tasks.prompts import PromptTask
from regimen.tasks.queries import QueryTask, query_information, select_queries
from regimen.tasks.recordings import minari_environment, minari_transitions, transition_rows, transitions
from regimen.tasks.scripted import ScriptedSpeaker, scripted_dialogues
from regimen.tasks.side_by_side import SideBySide
from regimen.tasks.suite import Suite
from regimen.tasks.utterances import UtteranceTask

__all__ = [
    "AttributionTest",
    "Conditioned",
    "DatasetTask",
    "DialogueEnv",
    "DialogueTask",
    "DualPlayTask",
    "EnvTask",
    "Evaluation",
    "Gymnasium",
    "GymnasiumVector",
    "OneByOne",
    "ParallelTask",
    "Partner",
    "PromptTask",
    "QueryTask",
    "QuestionReview",
    "Reply",
    "ScriptedSpeaker",
    "SideBySide",
    "StoredUsers",
    "Suite",
    "Task",
    "Tool",
    "UtteranceTask",
    "VectorEnv",
    "WithTools",
    "minari_environment",
    "minari_transitions",
    "query_information",
    "scripted_dialogues",
    "select_queries",
    "transition_rows",
    "transitions",
]
