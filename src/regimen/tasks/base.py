"""What a task is: it collects rollouts to learn from, and evaluates with a measure that is never the judge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: named numbers; larger is better unless the task's documentation says otherwise.
        samples: things to look at: images `[N, C, H, W]` in [0, 1] or [-1, 1], or lists of texts.
    """

    metrics: dict[str, float]
    samples: dict[str, Tensor | list[str]] = field(default_factory=dict)


@runtime_checkable
class Task(Protocol):
    """A source of rollouts.

    Attributes:
        name: unique within a regimen; `mixture/<name>` is the knob of its share.
        group_size: samples that answer the same prompt; `collect` is asked for multiples of it.
        knobs: the knobs that the task itself reads.
        generates: whether its samples are generated (and charged to the sample counter) or read from data.
    """

    name: str
    group_size: int
    generates: bool

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """The knobs that the task itself reads."""
        ...

    def collect(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator, size: int) -> Rollout:
        """A rollout of `size` samples, in groups of `group_size`."""
        ...

    def evaluate(self, cast: Mapping[str, Any], knobs: Mapping[str, float], rng: torch.Generator) -> Evaluation:
        """How well the cast does the task, under the knobs' evaluation values."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Position in the data, for an exact resume."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        ...
