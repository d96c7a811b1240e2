"""Reading rows of a table in an order that a checkpoint can restore."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from tensordict import TensorDict
from torch import Tensor

Order = Literal["shuffle", "random", "sequential"]


class RowReader:
    """Draws row indices: shuffled epochs, uniform with replacement, or in sequence."""

    def __init__(self, rows: int, order: Order, owner: str) -> None:
        """`owner` names the task in errors; `ValueError` for no rows or an unknown order."""
        if rows < 1:
            raise ValueError(f"task '{owner}' has no rows to draw from; expected at least one")
        if order not in get_args(Order):
            raise ValueError(f"task '{owner}': order '{order}' is not one of {', '.join(get_args(Order))}")
        self.rows, self.order, self.owner = rows, order, owner
        self._queue = torch.empty(0, dtype=torch.int64)

    def draw(self, count: int, rng: torch.Generator) -> Tensor:
        """int64 `[count]` row indices, on the CPU."""
        if self.order == "random":
            return torch.randint(self.rows, (count,), generator=rng, device=rng.device).cpu()
        while len(self._queue) < count:
            epoch = (
                torch.randperm(self.rows, generator=rng, device=rng.device).cpu()
                if self.order == "shuffle"
                else torch.arange(self.rows)
            )
            self._queue = torch.cat([self._queue, epoch])
        drawn, self._queue = self._queue[:count], self._queue[count:].clone()
        return drawn

    def state_dict(self) -> dict[str, Any]:
        """The rows still to come in this epoch."""
        return {"queue": self._queue}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a checkpoint; `ValueError` if it was of more rows."""
        queue: Tensor = state["queue"]
        if len(queue) and int(queue.max()) >= self.rows:
            raise ValueError(
                f"task '{self.owner}': the checkpoint would go on with row {int(queue.max())}, but the task has "
                f"{self.rows} rows; resume with the data that the run began with"
            )
        self._queue = queue


def check_finite(rows: TensorDict, owner: str) -> None:
    """Raise `ValueError`, with column and rows, if a floating-point column of a table holds NaN or infinity."""
    for key, value in rows.items(include_nested=True, leaves_only=True):
        if not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all()):
            continue
        bad = (~value.isfinite()).reshape(len(value), -1).any(1).nonzero().flatten().tolist()
        label = "/".join(key) if isinstance(key, tuple) else key
        raise ValueError(
            f"{owner}: column '{label}' holds values that are not finite in {len(bad)} rows ({bad[:5]}"
            f"{' ...' if len(bad) > 5 else ''}); drop or repair those rows before training"
        )
