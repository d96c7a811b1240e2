"""Prompts: contexts that a policy answers, several times each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.rows import Order, RowReader, check_finite

Evaluator = Callable[[Any, Mapping[str, float], torch.Generator], Evaluation]


class PromptTask:
    """Samples `group_size` answers of a policy to every prompt drawn from a table of rows."""

    generates = True

    def __init__(
        self,
        name: str,
        rows: TensorDict,
        *,
        group_size: int = 1,
        evaluate: Evaluator | None = None,
        order: Order = "shuffle",
        member: str = "policy",
        evaluated: str | None = None,
    ) -> None:
        """Make a task of a table of contexts.

        Args:
            name: unique within a regimen.
            rows: table `[N]` of contexts; a row is what the policy is given.
            group_size: answers per prompt; samples of one prompt share their `group`.
            evaluate: `(policy, knobs, rng) -> Evaluation`; it must not use the judge that trains.
            order: how rows are drawn, see `RowReader`.
            member: the cast member that answers.
            evaluated: the member that is evaluated (an averaged copy, say); `member` by default.

        Raises:
            ValueError: no rows, a group size below 1, or a floating-point column that holds NaN or infinity.
        """
        if group_size < 1:
            raise ValueError(f"task '{name}': group_size is {group_size}, expected at least 1")
        check_finite(rows, f"task '{name}'")
        self.name, self.rows, self.group_size = name, rows, group_size
        self.member, self.evaluated = member, evaluated or member
        self._evaluate = evaluate
        self._reader = RowReader(len(rows), order, name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The task reads none itself."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size // group_size` prompts, each answered `group_size` times.

        Raises:
            ValueError: `size` is not a multiple of `group_size`.
        """
        if size < 1 or size % self.group_size:
            raise ValueError(
                f"task '{self.name}' was asked for {size} samples, expected a multiple of its group_size "
                f"{self.group_size}"
            )
        started = time.time()
        drawn = self._reader.draw(size // self.group_size, rng).repeat_interleave(self.group_size)
        policy = cast[self.member]
        rollout: Rollout = policy.sample(self.rows[drawn].to(rng.device), knobs, rng)
        group = torch.arange(len(drawn), device=rng.device) // self.group_size
        return Rollout(rollout.data, (self.name,)).replace(
            group=group,
            started_at=torch.full((len(drawn),), started, dtype=torch.float64, device=rng.device),
            finished_at=torch.full((len(drawn),), time.time(), dtype=torch.float64, device=rng.device),
        )

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """What the evaluator finds; nothing if the task has none."""
        if self._evaluate is None:
            return Evaluation({})
        return self._evaluate(cast[self.evaluated], knobs, rng)

    def state_dict(self) -> dict[str, Any]:
        """Rows still to come in this epoch."""
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._reader.load_state_dict(state)
