"""The rollout: the one type that flows through collect, judge, credit, learn and adapt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from tensordict import NonTensorStack, TensorDict
from torch import Tensor

# Fields with one value per sample, fields with one per step, and nested tables of samples.
_PER_SAMPLE = ("task", "group", "version", "started_at", "finished_at")
_PER_STEP = ("logprobs", "mask", "loss_mask", "discount", "segment", "advantages")
_PER_STEP_WIDE = ("observations", "actions")
_TABLES = ("context", "knobs", "columns", "rewards", "status")
FIELDS = (*_PER_SAMPLE, *_PER_STEP, *_PER_STEP_WIDE, *_TABLES, "reward")


@dataclass(frozen=True)
class Rollout:
    """A batch of `B` samples of up to `T` decision steps (tokens, denoising steps or environment steps).

    A rollout is a value: parts return a new one with `replace`, which shares all tensors it does not change.
    Select rows with `rollout[index]`, read a side column with `rollout["image"]`.

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
        columns: table `[B]` of whatever else a paper conditions on.
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
        **fields: Any,
    ) -> Self:
        """A rollout of one task, with every shape checked.

        `mask` decides `B` and `T`; `loss_mask` defaults to it and `discount` to ones.

        Raises:
            ValueError: a field has another shape than it should, or is not a field of a rollout.
        """
        if mask.ndim != 2 or mask.dtype != torch.bool:
            raise ValueError(f"rollout field 'mask' has shape {list(mask.shape)} {mask.dtype}, expected [B, T] bool")
        batch, steps = mask.shape
        device = mask.device
        fields.setdefault("loss_mask", mask)
        fields.setdefault("discount", torch.ones(batch, steps, device=device))
        tables = {
            "context": _table(context, batch, device),
            "columns": _table(columns, batch, device),
            "knobs": _table(
                {k: torch.full((), v, device=device).expand(batch) for k, v in (knobs or {}).items()},
                batch,
                device,
            ),
        }
        index = torch.zeros(batch, dtype=torch.int64, device=device)
        given = {"task": index, "group": group, "mask": mask, **fields}
        for name, value in given.items():
            check_field(name, value, batch, steps)
        return cls(TensorDict({**given, **tables}, batch_size=[batch], device=device), (task,))

    def __len__(self) -> int:
        return int(self.data.batch_size[0])

    def __getitem__(self, index: Any) -> Any:
        """A side column by name, or the rows at an index, slice, mask or tensor."""
        if isinstance(index, str):
            return self.column(index)
        if isinstance(index, int):
            index = slice(index, index + 1 or None)
        return Rollout(self.data[index], self.task_names)

    def __getattr__(self, name: str) -> Any:
        if name in FIELDS:
            return self.data.get(name, None)
        raise AttributeError(f"a rollout has no field '{name}'; side columns are read as rollout['{name}']")

    def column(self, name: str) -> Any:
        """Side column `name`; `KeyError` with those there are."""
        value = self.columns.get(name, None)
        if value is None:
            there = ", ".join(sorted(self.columns.keys())) or "none"
            raise KeyError(f"the rollout of task {'/'.join(self.task_names)} has no column '{name}'; it has: {there}")
        return value

    @property
    def steps(self) -> int:
        """`T`, the number of steps that samples are padded to."""
        return int(self.mask.shape[1])

    @property
    def lengths(self) -> Tensor:
        """int64 `[B]`, existing steps of each sample."""
        result: Tensor = self.mask.sum(1)
        return result

    def replace(self, **fields: Any) -> Self:
        """The rollout with some fields changed or added, shapes checked.

        Tables (`columns`, `rewards`, `status`) given as mappings replace the whole table.
        """
        data = self.data.copy()
        for name, value in fields.items():
            if name in _TABLES:
                value = _table(value, len(self), self.mask.device)
            else:
                check_field(name, value, len(self), self.steps)
            data.set(name, value)
        return type(self)(data, self.task_names)

    def with_columns(self, **columns: Any) -> Self:
        """The rollout with side columns added or changed."""
        table = self.columns.copy()
        for name, value in _table(columns, len(self), self.mask.device).items():
            table.set(name, value)
        return self.replace(columns=table)

    def of_task(self, name: str) -> Self:
        """The rows of one task (possibly none)."""
        if name not in self.task_names:
            return type(self)(self.data[:0], self.task_names)
        return type(self)(self.data[self.task == self.task_names.index(name)], self.task_names)

    def task_counts(self) -> dict[str, int]:
        """Samples per task."""
        counts = torch.bincount(self.task, minlength=len(self.task_names)).tolist()
        return dict(zip(self.task_names, counts, strict=True))

    def to(self, device: Any) -> Self:
        """The rollout on another device."""
        return type(self)(self.data.to(device), self.task_names)

    @classmethod
    def cat(cls, parts: Sequence[Rollout]) -> Rollout:
        """One rollout of several, padded to the longest; groups of different parts stay different.

        Raises:
            ValueError: the parts do not have the same fields, or a field's shape differs beyond `[B, T]`.
        """
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(name for part in parts for name in part.task_names))
        steps = max(part.steps for part in parts)
        tables, next_group = [], 0
        for part in parts:
            data = part.data.copy() if part.steps == steps else _padded(part.data, steps)
            remap = torch.tensor([names.index(name) for name in part.task_names], device=part.task.device)
            data.set("task", remap[part.task])
            _, group = part.group.unique(return_inverse=True)
            data.set("group", group + next_group)
            next_group += int(group.max()) + 1 if len(part) else 0
            tables.append(data)
        _check_same_keys(tables, parts)
        return cls(torch.cat(tables, 0), names)

    def state_dict(self) -> dict[str, Any]:
        """Plain nested tensors and lists, for a checkpoint."""
        return {"task_names": list(self.task_names), "data": _plain(self.data), "rows": len(self)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> Self:
        """The rollout that `state_dict` described."""
        data = _table(state["data"], int(state["rows"]), None)
        return cls(data, tuple(state["task_names"]))


def check_field(name: str, value: Any, batch: int, steps: int) -> None:
    """Raise `ValueError` naming field, shape and expected shape unless the value fits a rollout."""
    if name not in FIELDS:
        raise ValueError(f"'{name}' is not a field of a rollout ({', '.join(FIELDS)}); put it among the columns")
    if value is None:
        raise ValueError(f"rollout field '{name}' is None; leave the field out instead")
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


def _table(value: Any, batch: int, device: Any) -> TensorDict:
    """A table `[batch]` from a mapping of tensors, nested mappings or lists of strings."""
    if isinstance(value, TensorDict):
        return value
    table = TensorDict({}, batch_size=[batch], device=device)
    for name, entry in (value or {}).items():
        if isinstance(entry, Mapping) and not isinstance(entry, TensorDict):
            entry = _table(entry, batch, device)
        elif isinstance(entry, list | tuple):
            entry = NonTensorStack(*entry)
        if len(entry) != batch:
            raise ValueError(f"rollout column '{name}' has {len(entry)} rows, expected {batch}")
        table.set(name, entry)
    return table


def _plain(table: TensorDict) -> dict[str, Any]:
    plain: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Tensor):
            plain[name] = value
        elif isinstance(value, TensorDict):
            plain[name] = _plain(value)
        else:
            plain[name] = value.tolist()
    return plain


def _padded(data: TensorDict, steps: int) -> TensorDict:
    """The table with every per-step field padded with zeros (False) to `steps`."""
    old = data.get("mask").shape[1]

    def grown(value: Any) -> Any:
        if isinstance(value, TensorDict):
            return value.apply(grown, batch_size=[value.batch_size[0], steps])
        return torch.cat([value, value.new_zeros(value.shape[0], steps - old, *value.shape[2:])], 1)

    padded = data.copy()
    for name in (*_PER_STEP, *_PER_STEP_WIDE):
        if (value := data.get(name, None)) is not None:
            padded.set(name, grown(value))
    for name in ("rewards",):
        if (value := data.get(name, None)) is not None:
            padded.set(name, value.apply(lambda v: grown(v) if v.ndim > 1 else v))
    if (value := data.get("reward", None)) is not None and value.ndim > 1:
        padded.set("reward", grown(value))
    return padded


def _check_same_keys(tables: Sequence[TensorDict], parts: Sequence[Rollout]) -> None:
    reference = set(tables[0].keys(include_nested=True))
    for table, part in zip(tables[1:], parts[1:], strict=True):
        odd = reference.symmetric_difference(table.keys(include_nested=True))
        if odd:
            named = ", ".join(sorted("/".join(k) if isinstance(k, tuple) else k for k in odd))
            raise ValueError(
                f"rollouts of tasks {parts[0].task_names} and {part.task_names} cannot be joined: only one of them "
                f"has {named}; give both tasks the same contexts and columns (zeros and a flag where one has none)"
            )
