"""The rollout: the one type that flows through collect, judge, credit, learn and adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

# Fields with one value per sample, fields with one per step, and nested tables of samples.
_PER_SAMPLE = ("task", "group", "version", "started_at", "finished_at")
_PER_STEP = ("logprobs", "mask", "loss_mask", "discount", "segment", "advantages")
_PER_STEP_WIDE = ("observations", "actions")
_TABLES = ("context", "knobs", "columns", "rewards", "status")
STEP_FIELDS = (*_PER_STEP, *_PER_STEP_WIDE, "step_columns")
FIELDS = (*_PER_SAMPLE, *STEP_FIELDS, *_TABLES, "reward")
_NAMES = frozenset(FIELDS)
_DTYPES = {"mask": torch.bool, "loss_mask": torch.bool, "task": torch.int64, "group": torch.int64}


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
        data = {name: _as_field(name, value, batch, steps, device) for name, value in given.items()}
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
            data.set(name, _as_field(name, value, len(self), self.steps, self.mask.device))
        return Rollout(data, self.task_names)

    def with_columns(self, **columns: Any) -> Rollout:
        """The rollout with side columns added or changed."""
        table = self.columns.exclude(*columns)
        for name, value in _table("columns", columns, [len(self)], self.mask.device).items():
            table.set(name, value)
        return self.replace(columns=table)

    def with_step_columns(self, **columns: Any) -> Rollout:
        """The rollout with side columns `[B, T, ...]` added or changed."""
        table = self.step_columns.exclude(*columns)
        for name, value in _table("step_columns", columns, [len(self), self.steps], self.mask.device).items():
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
        return self if steps == self.steps else Rollout(_padded(self.data, steps), self.task_names)

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
        self.__dict__.update(task_names=source.task_names, _source=source, _row=row, _step=step, _entries={})
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
        return self._source._table_of(column)

    def knob(self, name: str) -> Tensor | None:
        """`[B]`, the value of a knob in force while sampling; `None` if it was not among them."""
        if ("knobs", name) not in self._entries:
            self._entries["knobs", name] = self._taken(self._source.knob(name), wide=False)
        return self._entries["knobs", name]

    def _fields(self) -> list[str]:
        return self._source._fields()


def _as_field(name: str, value: Any, batch: int, steps: int, device: Any) -> Any:
    """A field's value as a rollout stores it, its shape and type checked."""
    if name in _TABLES:
        return _table(name, value, [batch], device)
    if name == "step_columns" or (name in _PER_STEP_WIDE and isinstance(value, Mapping)):
        value = _table(name, value, [batch, steps], device)
    check_field(name, value, batch, steps)
    return value


def check_field(name: str, value: Any, batch: int, steps: int) -> None:
    """Raise `ValueError` naming field, shape and expected shape unless the value fits a rollout."""
    if name not in FIELDS:
        raise ValueError(f"'{name}' is not a field of a rollout ({', '.join(FIELDS)}); put it among the columns")
    if not isinstance(value, Tensor | TensorDict):
        raise ValueError(
            f"rollout field '{name}' is a {type(value).__name__}, expected a tensor; leave out what is not there"
        )
    shape = tuple(value.batch_size if isinstance(value, TensorDict) else value.shape)
    if name in _PER_SAMPLE:
        good, expected = shape == (batch,), f"[{batch}]"
    elif name == "reward":
        good, expected = shape in ((batch,), (batch, steps)), f"[{batch}] or [{batch}, {steps}]"
    elif name == "advantages" or name in _PER_STEP_WIDE:
        good, expected = shape[:2] == (batch, steps), f"[{batch}, {steps}, ...]"
    else:
        good, expected = shape == (batch, steps), f"[{batch}, {steps}]"
    if not good:
        raise ValueError(f"rollout field '{name}' has shape {list(shape)}, expected {expected} (B={batch}, T={steps})")
    if (dtype := _DTYPES.get(name)) is not None and value.dtype != dtype:
        raise ValueError(f"rollout field '{name}' is of type {value.dtype}, expected {dtype}")


def check_joinable(a: TensorDict, b: TensorDict, what: str) -> None:
    """Raise `ValueError` unless two tables have the same entries with rows of the same shapes."""
    first, second = _leaf_shapes(a), _leaf_shapes(b)
    remedy = "give both the same contexts and columns (zeros and a flag where one has none)"
    if odd := sorted(first.keys() ^ second.keys()):
        raise ValueError(f"{what} cannot be joined: only one of them has {', '.join(odd)}; {remedy}")
    for name, shape in first.items():
        if shape != second[name]:
            raise ValueError(f"{what} cannot be joined: '{name}' has rows of {shape} and of {second[name]}; {remedy}")


def _leaf_shapes(table: TensorDict, prefix: str = "") -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for name, value in table.items():
        if isinstance(value, TensorDict):
            shapes |= _leaf_shapes(value, f"{prefix}{name}/")
        else:
            shapes[f"{prefix}{name}"] = list(value.shape[1:])
    return shapes


def _table(owner: str, value: Any, batch: Sequence[int], device: Any) -> TensorDict:
    """A table of `batch` rows from a mapping of tensors, nested mappings or lists (of numbers or texts)."""
    if isinstance(value, TensorDict):
        if list(value.batch_size[: len(batch)]) != list(batch):
            raise ValueError(f"rollout field '{owner}' is a table {list(value.batch_size)}, expected {list(batch)}")
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"rollout field '{owner}' is a {type(value).__name__}, expected a mapping or a table")
    table = TensorDict({}, batch_size=batch, device=device)
    for name, entry in value.items():
        # A stack of texts is a mapping too, without entries.
        if isinstance(entry, Mapping) and not isinstance(entry, NonTensorStack):
            entry = _table(f"{owner}/{name}", entry, batch, device)
        elif isinstance(entry, list | tuple):
            numbers = entry and all(isinstance(item, bool | int | float) for item in entry)
            entry = torch.tensor(entry) if numbers else NonTensorStack(*entry)
        elif not isinstance(entry, NonTensorStack):
            entry = torch.as_tensor(entry)
        if list(entry.shape[: len(batch)]) != list(batch):
            raise ValueError(
                f"rollout field '{owner}': '{name}' has shape {list(entry.shape)}, expected "
                f"[{', '.join(map(str, batch))}, ...]"
            )
        table.set(name, entry)
    return table


def plain_table(table: TensorDict) -> dict[str, Any]:
    """A table as nested dicts of tensors and lists, with its own shape beside them."""
    entries: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, TensorDict):
            entries[name] = plain_table(value)
        else:
            entries[name] = value if isinstance(value, Tensor) else value.tolist()
    return {"shape": list(table.batch_size), "entries": entries}


def table_from_plain(plain: Mapping[str, Any]) -> TensorDict:
    """The table that `plain_table` described, on the CPU."""
    table = TensorDict({}, batch_size=plain["shape"], device="cpu")
    for name, value in plain["entries"].items():
        if isinstance(value, Mapping):
            value = table_from_plain(value)
        elif isinstance(value, list | tuple):
            value = NonTensorStack(*value)
        table.set(name, value)
    return table


def _padded(data: TensorDict, steps: int) -> TensorDict:
    """The table with every per-step field padded with zeros (False) to `steps`."""
    old = data.get("mask").shape[1]

    def grown(value: Any) -> Any:
        if isinstance(value, TensorDict):
            return value.apply(grown, batch_size=[value.batch_size[0], steps])
        return torch.cat([value, value.new_zeros(value.shape[0], steps - old, *value.shape[2:])], 1)

    names = [name for name in (*STEP_FIELDS, "reward", "rewards") if name in data.keys()]  # noqa: SIM118
    padded = data.exclude(*names)
    for name in names:
        value = data.get(name)
        if name == "rewards":
            padded.set(name, value.apply(lambda v: grown(v) if v.ndim > 1 else v))
        else:
            padded.set(name, value if name == "reward" and value.ndim == 1 else grown(value))
    return padded
