"""One network for several tasks, and for each of them a head of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn


class WithTasks(nn.Module):
    """A torso, and behind its features the weights of tasks that stand at the end of the observations.

    The torso is given all of the observations, those weights included.

    Attributes:
        width: of the features, those of the torso and `tasks` more.
    """

    def __init__(self, torso: nn.Module, tasks: int) -> None:
        super().__init__()
        self.torso, self.tasks = torso, tasks
        self.width = cast(int, torso.width) + tasks

    def forward(self, observations: Tensor) -> Tensor:
        """Features `[R, width]` of observations `[R, D]` whose last `tasks` numbers are the weights."""
        features = self.torso(observations)
        return torch.cat([features, observations[..., -self.tasks :].to(features)], -1)


class MultiHead(nn.Module):
    """Heads of one kind, a sample's own chosen by weights that stand at the end of its features (see `WithTasks`).

    Where the weights are one 1 and zeros, that head alone is used and trained. Others mix what the heads say: values,
    logits, or the parameters of a distribution.
    """

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        """Make it of heads, each `(features, ...) ->` a tensor, or a data class of tensors (a distribution).

        Raises:
            ValueError: there are no heads.
        """
        super().__init__()
        if not heads:
            raise ValueError("MultiHead was given no heads; expected one for each task")
        self.heads = nn.ModuleList(heads)

    def forward(self, features: Tensor, *settings: Any) -> Any:
        """What the heads say of features `[..., D]`, mixed by the weights `[..., K]` behind them.

        Args:
            features: `[..., D + K]`.
            settings: passed on to every head, such as the temperature.
        """
        own, weights = features.tensor_split([features.shape[-1] - len(self.heads)], -1)
        return mixed([head(own, *settings) for head in self.heads], weights)


def mixed(parts: Sequence[Any], weights: Tensor) -> Any:
    """The sum of parts under weights `[..., K]`: of tensors `[..., *]`, or field by field of data classes of them.

    Fields with fewer dimensions than the weights, which are not of samples (an action's bounds), are the first part's.
    """
    if isinstance(parts[0], Tensor):
        return reduce(add, [part * _beside(weights[..., place], part) for place, part in enumerate(parts)])
    if not is_dataclass(parts[0]):
        raise TypeError(f"a head gave a {type(parts[0]).__name__}; expected a tensor, or a data class of tensors")
    values = {f.name: [getattr(part, f.name) for part in parts] for f in fields(parts[0])}
    found = {name: mixed(each, weights) if each[0].ndim >= weights.ndim else each[0] for name, each in values.items()}
    return replace(cast(Any, parts[0]), **found)


def _beside(weights: Tensor, values: Tensor) -> Tensor:
    """Weights `[...]` with as many dimensions as values `[..., *]`."""
    return weights.reshape(*weights.shape, *[1] * (values.ndim - weights.ndim))


class Tower(nn.Module):
    """A network of its own before a head: as a head of a `MultiHead` it shares nothing with the others."""

    def __init__(self, torso: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.torso, self.head = torso, head

    def forward(self, features: Tensor, *settings: Any) -> Any:
        """What the head says."""
        return self.head(self.torso(features), *settings)
