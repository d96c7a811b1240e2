"""Dialogues whose steps are whole utterances: the upper level of two, for critics and memories of transitions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from regimen.knobs import Knob
from regimen.policies.utterances import utterance_steps
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.dialogue import DialogueTask


class UtteranceTask:
    """A dialogue task whose samples have a step for each turn instead of each token; see `utterance_steps`.

    What learns from steps learns from turns then: `ReplayMemory(unit="transition")`, `GAE`, `NStepReturn`, critics. An
    `UtterancePolicy` scores them. It evaluates as the dialogue task does.
    """

    generates = True

    def __init__(self, task: DialogueTask, *, context: int) -> None:
        """Put a task of utterances around one of tokens.

        Args:
            task: it speaks, and is answered. Dialogues must end within its `max_turns`.
            context: tokens of the history that a step holds, the newest.
        """
        self.task, self.context = task, context
        self.name, self.group_size = task.name, task.group_size

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """Those of the task."""
        return self.task.knobs

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` dialogues; utterances have room for `max_new_tokens` tokens."""
        return utterance_steps(self.task.collect(cast, knobs, rng, size), self.context, int(knobs["max_new_tokens"]))

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """That of the task."""
        return self.task.evaluate(cast, knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """That of the task."""
        return self.task.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore it."""
        self.task.load_state_dict(state)
