"""The fields of a rollout: their shapes and types, and tables of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
_DTYPES = {"mask": torch.bool, "loss_mask": torch.bool, "task": torch.int64, "group": torch.int64}


def as_field(name: str, value: Any, batch: int, steps: int, device: Any) -> Any:
    """A field's value as a rollout stores it, its shape and type checked."""
    if name in _TABLES:
        return table_of(name, value, [batch], device)
    if name == "step_columns" or (name in _PER_STEP_WIDE and isinstance(value, Mapping)):
        value = table_of(name, value, [batch, steps], device)
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


def table_of(owner: str, value: Any, batch: Sequence[int], device: Any) -> TensorDict:
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
            entry = table_of(f"{owner}/{name}", entry, batch, device)
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


def padded_table(data: TensorDict, steps: int) -> TensorDict:
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
