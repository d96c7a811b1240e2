"""Data sets: rows to learn from as they are, without sampling a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from regimen.fields import STEP_FIELDS
from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.rows import Order, RowReader, check_finite

Transform = Callable[[TensorDict, torch.Generator], TensorDict]
Measure = Callable[[Mapping[str, Any], TensorDict], Mapping[str, float]]


class DatasetTask:
    """Draws rows of a data set: supervised and offline learning are stages with such a task and no judge.

    A row's `context` table becomes the rollout's context; entries named like the fields of a rollout's steps
    (`actions`, `observations`, `mask`, `loss_mask`, ... each `[N, T, ...]`) become those fields; everything else
    its columns. Rows without steps have one.
    """

    generates = False
    group_size = 1

    def __init__(
        self,
        name: str,
        rows: TensorDict,
        *,
        transform: Transform | None = None,
        order: Order = "shuffle",
        evaluate: Measure | None = None,
    ) -> None:
        """Make a task of a data set.

        Args:
            name: unique within a regimen.
            rows: table `[N]` with a nested table `context`, fields of steps, and any number of columns.
            transform: applied to the drawn rows at every draw (augmentation, relabelling).
            order: how rows are drawn, see `RowReader`.
            evaluate: the cast and all rows to metrics, for rows that were held out.

        Raises:
            ValueError: there are no rows, or a floating-point column holds NaN or infinity.
        """
        check_finite(rows, f"task '{name}'")
        self.name, self.rows, self.transform, self.measure = name, rows, transform, evaluate
        self._reader = RowReader(len(rows), order, name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The task reads none."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` rows as a rollout."""
        rows = self.rows[self._reader.draw(size, rng)].to(rng.device)
        if self.transform is not None:
            rows = self.transform(rows, rng)
        fields = {field: rows[field] for field in STEP_FIELDS if field in rows.keys()}  # noqa: SIM118
        steps = next((value.shape[1] for value in fields.values() if value.ndim > 1), 1)
        fields.setdefault("mask", torch.ones(size, steps, dtype=torch.bool, device=rng.device))
        return Rollout.create(
            task=self.name,
            group=torch.arange(size, device=rng.device),
            context=rows.get("context", None),
            columns=rows.exclude("context", *fields),
            knobs=knobs,
            **fields,
        )

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """What its measure finds; a data set has none of its own."""
        return Evaluation(dict(self.measure(cast, self.rows)) if self.measure is not None else {})

    def state_dict(self) -> dict[str, Any]:
        """Rows still to come in this epoch."""
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._reader.load_state_dict(state)
