"""The rollout: the one type that flows through collect, judge, credit, learn and adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from regimen.fields import (
    FIELDS,
    STEP_FIELDS,
    as_field,
    check_joinable,
    padded_table,
    plain_table,
    table_from_plain,
    table_of,
)

_NAMES = frozenset(FIELDS)
# Tables whose entries are read one by one.
_TABLES = ("columns", "step_columns", "knobs", "rewards")


@dataclass(frozen=True)
class Rollout:
    """A batch of `B` samples of up to `T` decision steps (tokens, denoising steps or environment steps).

    A rollout is a value: parts return a new one with `replace`, which shares all tensors it does not change.
    Select rows with `rollout[index]`, read a side column with `rollout["image"]`. Of selected rows each field is taken
    when it is first read, so that a minibatch costs what its objectives read.

    Attributes (each also a property; `None` where a rollout does not have it):
        task: int64 `[B]`, index into `task_names`.
        group: int64 `[B]`, equal for samples that answer the same prompt or start.
        context: table `[B]` of what the policy was asked.
        observations, actions: `[B, T, ...]`, a tensor or a table of tensors.
        logprobs: `[B, T]`, the behaviour policy's log-probability of each action as it was sampled.
        mask: bool `[B, T]`, the step exists.
        loss_mask: bool `[B, T]`, the step is learned from (False for forced, foreign and unjudged steps).
        discount: `[B, T]`, what the value of the next step is multiplied by: termination, truncation and a
            scheduled discount are this one tensor.
        segment: int64 `[B, T]`, turn of a dialogue, span of a text, option.
        knobs: table `[B]`, the knob values in force while sampling.
        version, started_at, finished_at: `[B]`, the policy's version and the times (seconds).
        rewards, status: tables of components, `[B]` or `[B, T]` raw values and uint8 `[B]` outcomes.
        reward: `[B]` or `[B, T]`, the total that credit consumes.
        advantages: `[B, T]`, or with more dimensions for a weight map over a sample.
        columns: table `[B]` of whatever else a paper conditions on; step_columns: the same per step, `[B, T]`.
    """

    data: TensorDict
    task_names: tuple[str, ...]

    @classmethod
    def create(
        cls,
        *,
        task: str,
        group: Tensor,
        mask: Tensor,
        context: Mapping[str, Any] | TensorDict | None = None,
        knobs: Mapping[str, float] | None = None,
        columns: Mapping[str, Any] | TensorDict | None = None,
        step_columns: Mapping[str, Any] | TensorDict | None = None,
        **fields: Any,
    ) -> Rollout:
        """A rollout of one task, with every shape checked.

        `mask` decides `B` and `T`; `loss_mask` defaults to it and `discount` to ones.

        Raises:
            ValueError: a field has another shape than it should, or is not a field of a rollout.
        """
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"rollout field 'mask' has shape {list(mask.shape)} {mask.dtype}, expected [B, T] bool")
        batch, steps = mask.shape
        device = mask.device
        in_force = {name: torch.full((), value, device=device).expand(batch) for name, value in (knobs or {}).items()}
        given = {
            "task": torch.zeros(batch, dtype=torch.int64, device=device),
            "group": group,
            "mask": mask,
            "loss_mask": mask,
            "discount": torch.ones(batch, steps, device=device),
            "context": context if context is not None else {},
            "columns": columns if columns is not None else {},
            "step_columns": step_columns if step_columns is not None else {},
            "knobs": in_force,
            **fields,
        }
        data = {name: as_field(name, value, batch, steps, device) for name, value in given.items()}
        return cls(TensorDict(data, batch_size=[batch], device=device), (task,))

    def __len__(self) -> int:
        return int(self.data.batch_size[0])

    def __getitem__(self, index: Any) -> Any:
        """A side column by name, or the rows at an index, slice, mask or tensor."""
        if isinstance(index, str):
            return self.column(index)
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return _Rows(self, index)

    def __getattr__(self, name: str) -> Any:
        if name in _NAMES:
            return self.data.get(name, None)
        raise AttributeError(f"a rollout has no field '{name}'; side columns are read as rollout['{name}']")

    def column(self, name: str) -> Any:
        """Side column `name`, per sample or per step, a list if it holds texts; `KeyError` with those there are."""
        if (found := self.get(name)) is None:
            there = ", ".join(sorted([*self.columns.keys(), *self.step_columns.keys()])) or "none"
            raise KeyError(f"the rollout of task {'/'.join(self.task_names)} has no column '{name}'; it has: {there}")
        return found

    def get(self, name: str, default: Any = None) -> Any:
        """Side column `name`, per sample or per step, or `default`."""
        table = self._table_of(name)
        return default if table is None else getattr(self, table)[name]

    def _table_of(self, column: str) -> str | None:
        """Which table a side column stands in."""
        tables = ("columns", "step_columns")
        return next((table for table in tables if column in getattr(self, table).keys()), None)  # noqa: SIM118

    def knob(self, name: str) -> Tensor | None:
        """`[B]`, the value of a knob in force while sampling; `None` if it was not among them."""
        value: Tensor | None = self.knobs.get(name, None)
        return value

    def _fields(self) -> list[str]:
        """The names of the fields that there are."""
        return list(self.data.keys())

    @property
    def steps(self) -> int:
        """`T`, the number of steps that samples are padded to."""
        return int(self.mask.shape[1])

    @property
    def lengths(self) -> Tensor:
        """int64 `[B]`, existing steps of each sample."""
        result: Tensor = self.mask.sum(1)
        return result

    def replace(self, **fields: Any) -> Rollout:
        """The rollout with some fields changed or added, shapes checked.

        Tables (`columns`, `rewards`, `status`) given as mappings replace the whole table.
        """
        # Not `copy`, which goes through every text of every table.
        data = self.data.exclude(*fields)
        for name, value in fields.items():
            data.set(name, as_field(name, value, len(self), self.steps, self.mask.device))
        return Rollout(data, self.task_names)

    def with_columns(self, **columns: Any) -> Rollout:
        """The rollout with side columns added or changed."""
        table = self.columns.exclude(*columns)
        for name, value in table_of("columns", columns, [len(self)], self.mask.device).items():
            table.set(name, value)
        return self.replace(columns=table)

    def with_step_columns(self, **columns: Any) -> Rollout:
        """The rollout with side columns `[B, T, ...]` added or changed."""
        table = self.step_columns.exclude(*columns)
        for name, value in table_of("step_columns", columns, [len(self), self.steps], self.mask.device).items():
            table.set(name, value)
        return self.replace(step_columns=table)

    def unrolled(self, where: Tensor | None = None) -> Rollout:
        """Every step as a sample of one step: `R` rows, of the steps `where` (bool `[B, T]`, default `mask`)."""
        return _Rows(self, *(self.mask if where is None else where).nonzero(as_tuple=True))

    def padded(self, steps: int) -> Rollout:
        """The rollout with `T` raised to `steps`; the new steps are masked.

        Raises:
            ValueError: it has more steps.
        """
        if steps < self.steps:
            raise ValueError(f"the rollout has {self.steps} steps and cannot be padded to {steps}")
        return self if steps == self.steps else Rollout(padded_table(self.data, steps), self.task_names)

    def of_task(self, name: str) -> Rollout:
        """The rows of one task (possibly none)."""
        if name not in self.task_names:
            return _Rows(self, slice(0, 0))
        return _Rows(self, self.task == self.task_names.index(name))

    def task_counts(self) -> dict[str, int]:
        """Samples per task."""
        counts = torch.bincount(self.task, minlength=len(self.task_names)).tolist()
        return dict(zip(self.task_names, counts, strict=True))

    def to(self, device: Any) -> Rollout:
        """The rollout on another device."""
        if self.mask.device == torch.device(device):
            return self
        return Rollout(self.data.to(device), self.task_names)

    @classmethod
    def cat(cls, parts: Sequence[Rollout]) -> Rollout:
        """One rollout of several, padded to the longest; groups of different parts stay different.

        Raises:
            ValueError: there are no parts, they do not have the same fields, or a field's shape differs beyond
                `[B, T]`.
        """
        if not parts:
            raise ValueError("Rollout.cat was given no parts; expected at least one rollout")
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(name for part in parts for name in part.task_names))
        steps = max(part.steps for part in parts)
        tables, next_group = [], 0
        for part in parts:
            remap = torch.tensor([names.index(name) for name in part.task_names], device=part.task.device)
            distinct, group = part.group.unique(return_inverse=True)
            tables.append(part.padded(steps).replace(task=remap[part.task], group=group + next_group).data)
            next_group += len(distinct)
        for other, part in zip(tables[1:], parts[1:], strict=True):
            check_joinable(tables[0], other, f"rollouts of tasks {parts[0].task_names} and {part.task_names}")
        return cls(torch.cat(tables, 0), names)

    def state_dict(self) -> dict[str, Any]:
        """Plain nested tensors and lists, for a checkpoint."""
        return {"task_names": list(self.task_names), "data": plain_table(self.data)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Rollout:
        """The rollout that `state_dict` described."""
        data = table_from_plain(state["data"])
        return cls(data, tuple(state["task_names"]))


class Steps:
    """Some steps of a rollout: takes them as rows `[R, ...]` out of `[B, T, ...]`, and spreads rows over `[B, T]`.

    Attributes:
        where: bool `[B, T]`, which steps.
        every: whether it is all of them, so that nothing has to be picked.
    """

    def __init__(self, where: Tensor) -> None:
        self.where, self.every = where, bool(where.all())

    @cached_property
    def _index(self) -> Tensor:
        return self.where.flatten().nonzero().squeeze(1)

    @cached_property
    def row(self) -> Tensor:
        """int64 `[R]`, the sample of each step."""
        return self.of(torch.arange(self.where.shape[0], device=self.where.device)[:, None].expand(self.where.shape))

    @cached_property
    def step(self) -> Tensor:
        """int64 `[R]`, the place of each step in its sample."""
        return self.of(torch.arange(self.where.shape[1], device=self.where.device).expand(self.where.shape))

    def of(self, values: Any) -> Any:
        """The steps `[R, ...]` of a tensor or table `[B, T, ...]`."""
        flat = values.flatten(0, 1)
        return flat if self.every else flat[self._index]

    def of_rows(self, values: Tensor) -> Tensor:
        """The samples' values `[B, ...]` for each of the steps, `[R, ...]`."""
        return values if self.every and self.where.shape[1] == 1 else values[self.row]

    def spread(self, rows: Tensor) -> Tensor:
        """Rows `[R, ...]` in their places `[B, T, ...]`, 0 elsewhere."""
        if self.every:
            return rows.view(*self.where.shape, *rows.shape[1:])
        where = self.where.view(*self.where.shape, *[1] * (rows.ndim - 1))
        return rows.new_zeros(*self.where.shape, *rows.shape[1:]).masked_scatter(where, rows)


class _Rows(Rollout):
    """Rows of a rollout, or single steps of them as rows: each field is taken when it is first read."""

    def __init__(self, source: Rollout, row: Any, step: Tensor | None = None) -> None:
        if isinstance(row, Tensor) and row.dtype == torch.bool:
            row = row.nonzero().squeeze(1)
        # Rows of rows have the columns of the source, and do not look for them again.
        tables = source._tables if isinstance(source, _Rows) else {}
        given = {"task_names": source.task_names, "_names": source._fields(), "_tables": tables}
        self.__dict__.update(given, _source=source, _row=row, _step=step, _entries={})
        self.__dict__["mask"] = self._taken(source.mask, wide=True)

    @cached_property
    def data(self) -> TensorDict:
        """All fields."""
        device = self.mask.device
        return TensorDict({name: getattr(self, name) for name in self._fields()}, [len(self)], device=device)

    def __len__(self) -> int:
        return len(self.mask)

    def __getattr__(self, name: str) -> Any:
        if name not in _NAMES:
            return super().__getattr__(name)
        value = getattr(self._source, name)
        if name == "rewards" and value is not None and self._step is not None:
            taken = TensorDict({n: self._taken(v, wide=v.ndim > 1) for n, v in value.items()}, [len(self)])
        else:
            wide = name in STEP_FIELDS or (name == "reward" and value is not None and value.ndim > 1)
            taken = self._taken(value, wide)
        self.__dict__[name] = taken
        return taken

    def _taken(self, value: Any, wide: bool) -> Any:
        """The rows of a field or column; of one that is `wide`, which has a value per step, the steps."""
        if value is None:
            return None
        return value[self._row] if self._step is None or not wide else value[self._row, self._step].unsqueeze(1)

    def get(self, name: str, default: Any = None) -> Any:
        """Side column `name`, per sample or per step, or `default`."""
        table = self._table_of(name)
        if table is None:
            return default
        if name not in self._entries:
            value = self._source.get(name)
            # Texts are lists, which are not indexed like numbers.
            known = isinstance(value, Tensor | TensorDict)
            self._entries[name] = self._taken(value, table != "columns") if known else getattr(self, table)[name]
        return self._entries[name]

    def _table_of(self, column: str) -> str | None:
        if column not in self._tables:
            self._tables[column] = self._source._table_of(column)
        found: str | None = self._tables[column]
        return found

    def knob(self, name: str) -> Tensor | None:
        """`[B]`, the value of a knob in force while sampling; `None` if it was not among them."""
        if ("knobs", name) not in self._entries:
            self._entries["knobs", name] = self._taken(self._source.knob(name), wide=False)
        return self._entries["knobs", name]

    def _fields(self) -> list[str]:
        return self._names

    def replace(self, **fields: Any) -> Rollout:
        """The rows with some fields changed or added; the others are still taken when they are read."""
        if not fields.keys().isdisjoint(_TABLES):
            return super().replace(**fields)
        checked = {
            name: as_field(name, value, len(self), self.steps, self.mask.device) for name, value in fields.items()
        }
        changed = copy(self)
        changed.__dict__.pop("data", None)
        names = list(dict.fromkeys([*self._names, *fields]))
        changed.__dict__.update(checked, _names=names, _entries=dict(self._entries))
        return changed
