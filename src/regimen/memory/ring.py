"""Rings of rows: preallocated tables in which new rows take the place of the oldest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

from regimen.fields import check_joinable, plain_table, table_from_plain


class Ring:
    """The last `capacity` rows of all that were added. Row number `i` (0, 1, ...) lies in slot `i % capacity`.

    Attributes:
        capacity: how many rows are kept.
        count: how many have been added.
        table: `[capacity]`; what lies in slots that have not been filled is undefined. `None` before the first row.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity, self.count = capacity, 0
        self.table: TensorDict | None = None

    def __len__(self) -> int:
        return min(self.count, self.capacity)

    def __getitem__(self, slots: Tensor) -> TensorDict:
        """The rows in some slots, in the shape of the slots."""
        assert self.table is not None, "only asked where there are rows"
        rows: TensorDict = self.table[slots]
        return rows

    @torch.no_grad()
    def add(self, rows: TensorDict) -> Tensor:
        """Store rows `[R]`, at most `capacity`, over the oldest ones; the slots they lie in, int64 `[R]`."""
        table = _room(rows, self.capacity) if self.table is None else self.table.to(rows.device)
        slots = torch.arange(self.count, self.count + len(rows), device=rows.device) % self.capacity
        first = self.count % self.capacity
        end = first + len(rows)
        # A slice, where they lie side by side, is written in less time than places one by one.
        table[slice(first, end) if end <= self.capacity else slots] = rows
        self.table, self.count = table, self.count + len(rows)
        return slots

    def draw(self, size: int, rng: torch.Generator) -> Tensor:
        """Slots int64 `[size]`, uniformly with replacement, on the table's device."""
        assert self.table is not None, "only asked where there are rows"
        slots = torch.randint(len(self), (size,), generator=rng, device=rng.device)
        return slots.to(self.table.device)

    def last(self, size: int | None) -> Tensor:
        """Slots int64 of the newest rows, the oldest of them first: `size` of them, or all."""
        assert self.table is not None, "only asked where there are rows"
        first = self.count - min(len(self), self.capacity if size is None else size)
        return torch.arange(first, self.count, device=self.table.device) % self.capacity

    def ages(self, slots: Tensor) -> Tensor:
        """How many rows came after those in some slots."""
        return (self.count - 1 - slots) % self.capacity

    def grow(self, capacity: int) -> None:
        """Make room for more rows."""
        first = self.count - len(self)
        rows = self[torch.arange(first, self.count) % self.capacity] if len(self) else None
        self.capacity, self.count, self.table = capacity, first, None
        if rows is not None:
            self.add(rows)

    def state_dict(self) -> dict[str, Any]:
        """The slots that are filled, and how many rows there were."""
        table = None if self.table is None else plain_table(self.table[: len(self)])
        return {"table": table, "count": self.count, "capacity": self.capacity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.capacity, self.count, self.table = int(state["capacity"]), int(state["count"]), None
        if state["table"] is not None:
            filled = table_from_plain(state["table"])
            self.table = _room(filled, self.capacity)
            self.table[: len(filled)] = filled


def fitted(table: TensorDict, rows: TensorDict) -> tuple[TensorDict, TensorDict]:
    """What is kept and what is new, both with the knobs that both were sampled under.

    Raises:
        ValueError: they have other fields.
    """
    shared = [name for name in table["knobs"].keys() if name in rows["knobs"].keys()]  # noqa: SIM118
    table, rows = (
        part
        if len(part["knobs"].keys()) == len(shared)
        else part.exclude("knobs").set("knobs", part["knobs"].select(*shared))
        for part in (table, rows)
    )
    check_joinable(table, rows, "the memory and a new rollout")
    return table, rows


def _room(rows: TensorDict, capacity: int) -> TensorDict:
    """A table of `capacity` rows like those given, its numbers not yet set."""

    def empty(value: Any) -> Any:
        if isinstance(value, NonTensorStack):
            return value[:1].expand(capacity).clone()
        if isinstance(value, TensorDict):
            shape = [capacity, *value.batch_size[1:]]
            return TensorDict({name: empty(entry) for name, entry in value.items()}, shape, device=rows.device)
        return value.new_empty(capacity, *value.shape[1:])

    room: TensorDict = empty(rows)
    return room
