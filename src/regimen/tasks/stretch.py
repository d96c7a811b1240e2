"""What is recorded of a stretch of steps in several copies of an environment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from torch.nn.functional import pad

from regimen.policies.acting import Acted, joined, logprobs_of
from regimen.tasks.environments.base import Change, Observations

# Steps whose tensors are put together at once: a processor's cache holds those of so many, and not of thousands.
_AT_HAND = 64


@dataclass(slots=True)
class Step:
    """One step of every copy.

    Attributes:
        alive: bool `[N]`, copies whose sample it belongs to; begins: bool `[N]`, those that begin an episode with it.
        seen: the observations acted on; acted: how; change: what that did.
        episode: `[N]` each, the values of the environment's knobs in the copies' episodes.
    """

    alive: Tensor
    begins: Tensor
    seen: Observations
    acted: Acted
    change: Change
    episode: dict[str, Tensor]


@dataclass(slots=True)
class _Laid:
    """Several steps, put together.

    Attributes:
        acted: how the policy acted, one step after the other, `[T N, ...]`.
        columns: `[N, T, ...]` by name; told: those that the environment tells.
    """

    acted: Acted
    columns: dict[str, Any]
    told: dict[str, Tensor]

    @classmethod
    def of(cls, steps: list[Step]) -> _Laid:
        """By the steps, in order."""
        first, changes = steps[0], [step.change for step in steps]
        columns = {
            "mask": _beside([step.alive for step in steps]),
            "start": _beside([step.begins for step in steps]),
            "observations": _beside([step.seen for step in steps]),
            "next_observations": _beside([change.observations for change in changes]),
            "env_reward": _beside([change.reward for change in changes]),
            "terminated": _beside([change.terminated for change in changes]),
            "truncated": _beside([change.truncated for change in changes]),
            **{name: _beside([step.episode[name] for step in steps]) for name in first.episode},
        }
        told = {name: _beside([change.info[name] for change in changes]) for name in first.change.info}
        return cls(joined([step.acted for step in steps]), columns, told)

    @classmethod
    def cat(cls, parts: list[_Laid]) -> _Laid:
        """All the steps of several."""
        first = parts[0]
        if len(parts) == 1:
            return first
        columns = {name: torch.cat([part.columns[name] for part in parts], 1) for name in first.columns}
        told = {name: torch.cat([part.told[name] for part in parts], 1) for name in first.told}
        return cls(joined([part.acted for part in parts]), columns, told)


class Record:
    """The steps of a stretch, in order; put together a few at a time."""

    def __init__(self) -> None:
        self._steps: list[Step] = []
        self._laid: list[_Laid] = []

    def add(self, step: Step) -> None:
        """One more."""
        self._steps.append(step)
        if len(self._steps) == _AT_HAND:
            self._lay()

    def _lay(self) -> None:
        self._laid.append(_Laid.of(self._steps))
        self._steps = []

    def _all(self) -> _Laid:
        if self._steps:
            self._lay()
        return _Laid.cat(self._laid)

    def fields(self, rows: int, discount: float, device: torch.device) -> dict[str, Any]:
        """The fields and step columns of a rollout of the first `rows` copies."""
        laid = self._all()
        columns = {name: value[:rows] for name, value in laid.columns.items()}
        told = {name: value[:rows] for name, value in laid.told.items()}
        mask, over, cut = (columns.pop(name) for name in ("mask", "terminated", "truncated"))
        last = mask & ~pad(mask[:, 1:], (0, 1))
        logprobs = logprobs_of(laid.acted, device)
        fields = {
            "mask": mask,
            "discount": torch.where(over, 0.0, discount),
            "observations": columns.pop("observations"),
            "actions": laid.acted.actions.unflatten(0, (mask.shape[1], -1)).transpose(0, 1)[:rows].contiguous(),
        }
        if logprobs is not None:
            fields["logprobs"] = logprobs.view(mask.shape[1], -1).t()[:rows].to(mask.device)
        return fields | {"step_columns": {**columns, "cut": mask & (cut | last) & ~over, **told}}

    def summary(self) -> dict[str, float]:
        """Means over episodes: return, length, and what the environment told in their last step."""
        laid = self._all()
        mask = laid.columns["mask"]
        found = {"return": (laid.columns["env_reward"] * mask).sum(1), "length": mask.sum(1)}
        last = mask.sum(1, keepdim=True) - 1
        found |= {name: told.gather(1, last).squeeze(1) for name, told in laid.told.items() if told.ndim == 2}
        return {name: float(value.double().mean()) for name, value in found.items()}


def _beside(values: list[Any]) -> Any:
    """What is of `T` steps and `N` copies, `[N, T, ...]`, from a tensor or table `[N, ...]` of each step."""
    if isinstance(values[0], TensorDict):
        return torch.stack(values, 1)
    # Side by side, small tensors are joined at half the speed that they are one below the other.
    return torch.stack(values).transpose(0, 1).contiguous()
