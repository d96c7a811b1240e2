"""Data sets: rows to learn from as they are, without sampling a policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from tensordict import TensorDict

from regimen.knobs import Knob
from regimen.rollout import Rollout
from regimen.tasks.base import Evaluation
from regimen.tasks.rows import Order, RowReader

Transform = Callable[[TensorDict, torch.Generator], TensorDict]


class DatasetTask:
    """Draws rows of a data set: supervised and offline learning are stages with such a task and no judge.

    A row's `context` table becomes the rollout's context, everything else its columns.
    """

    generates = False
    group_size = 1

    def __init__(
        self, name: str, rows: TensorDict, *, transform: Transform | None = None, order: Order = "shuffle"
    ) -> None:
        """Make a task of a data set.

        Args:
            name: unique within a regimen.
            rows: table `[N]` with a nested table `context` and any number of columns.
            transform: applied to the drawn rows at every draw (augmentation, relabelling).
            order: how rows are drawn, see `RowReader`.

        Raises:
            ValueError: there are no rows, or a floating-point column holds NaN or infinity.
        """
        for key, value in rows.items(include_nested=True, leaves_only=True):
            if isinstance(value, torch.Tensor) and value.is_floating_point() and not bool(value.isfinite().all()):
                bad = (~value.isfinite()).flatten(1).any(1).nonzero().flatten() if value.ndim > 1 else None
                where = f"rows {bad[:5].tolist()}" if bad is not None else "the column"
                label = "/".join(key) if isinstance(key, tuple) else key
                raise ValueError(
                    f"task '{name}': column '{label}' holds values that are not finite ({where}); "
                    "drop or repair those rows before training"
                )
        self.name, self.rows, self.transform = name, rows, transform
        self._reader = RowReader(len(rows), order, name)

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The task reads none."""
        return ()

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """`size` rows as a rollout of one step each."""
        rows = self.rows[self._reader.draw(size, rng)].to(rng.device)
        if self.transform is not None:
            rows = self.transform(rows, rng)
        columns = rows.copy()
        context = columns.pop("context", None)
        return Rollout.create(
            task=self.name,
            group=torch.arange(size, device=rng.device),
            mask=torch.ones(size, 1, dtype=torch.bool, device=rng.device),
            context=context,
            columns=columns,
            knobs=knobs,
        )

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """A data set has no measure of its own."""
        return Evaluation({})

    def state_dict(self) -> dict[str, Any]:
        """Rows still to come in this epoch."""
        return self._reader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint."""
        self._reader.load_state_dict(state)
