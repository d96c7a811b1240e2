"""Preference pairs: the best and the worst answer to the same prompt.

A pair is one row of a rollout. The row is the chosen sample; the rejected one is nested in its side column
`rejected`, a table with the fields of a rollout. Shuffling, slicing, storing and mixing rows therefore keep pairs
whole, and an objective that reads the row itself (supervised likelihood) learns from what was chosen. Optional
columns `[P]`: `margin`, `smoothing`, `weight`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from regimen.knobs import Knob
from regimen.rollout import Rollout


def best_and_worst(scores: Tensor, group: Tensor, include: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Rows of the highest and of the lowest score in every group; the first of equals.

    Args:
        scores: `[B]`.
        group: int64 `[B]`, equal for siblings.
        include: bool `[B]`, rows that may be chosen; all by default. Groups without one are left out.

    Returns:
        Two int64 tensors `[P]`, a pair per group in the order of the group's number.

    Raises:
        ValueError: unequal shapes.
    """
    if scores.ndim != 1 or scores.shape != group.shape:
        raise ValueError(f"best_and_worst: scores {list(scores.shape)} and group {list(group.shape)}, expected [B]")
    include = torch.ones_like(group, dtype=torch.bool) if include is None else include
    _, index = group[include].unique(return_inverse=True)
    rows = include.nonzero().flatten()
    return _first_highest(scores[include], index, rows), _first_highest(-scores[include], index, rows)


def _first_highest(scores: Tensor, index: Tensor, rows: Tensor) -> Tensor:
    """Of every group (numbered by `index`), the row that comes first among those of the highest score."""
    groups = int(index.max()) + 1 if len(index) else 0
    highest = torch.full((groups,), -torch.inf, dtype=scores.dtype, device=scores.device)
    highest = highest.scatter_reduce(0, index, scores, "amax")
    best = scores == highest[index]
    first = torch.full((groups,), torch.iinfo(torch.int64).max, dtype=torch.int64, device=scores.device)
    return first.scatter_reduce(0, index[best], rows[best], "amin")


@dataclass(frozen=True)
class BestWorstPairSelector:
    """One pair per group: its best sample, chosen, and its worst, rejected.

    Attributes:
        key: what is compared, the total `"reward"` or the name of a raw component; a reward per step is summed.
        min_gap: a pair is kept if its scores differ by more.

    Samples that left the loss, or that the component did not score, are in no pair. Groups without a pair are left
    out, so the result may have no rows; an update then takes no step.
    """

    key: str = "reward"
    min_gap: float = 0.0

    def __post_init__(self) -> None:
        if self.min_gap < 0:
            raise ValueError(f"BestWorstPairSelector: min_gap is {self.min_gap}, expected at least 0")

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """`P` pairs: the chosen rows, with the rejected ones in the column `rejected`.

        Raises:
            ValueError: the rollout has no such score.
        """
        scores = self._scores(rollout)
        best, worst = best_and_worst(scores, rollout.group, rollout.loss_mask.any(1) & scores.isfinite())
        keep = scores[best] - scores[worst] > self.min_gap
        chosen: Rollout = rollout[best[keep]]
        return chosen.with_columns(rejected=rollout[worst[keep]].data)

    def _scores(self, rollout: Rollout) -> Tensor:
        if self.key == "reward":
            scores: Tensor | None = rollout.reward
        else:
            scores = None if rollout.rewards is None else rollout.rewards.get(self.key, None)
        if scores is None:
            there = ", ".join(rollout.rewards.keys()) if rollout.rewards is not None else "none"
            raise ValueError(
                f"BestWorstPairSelector: the rollout has no reward '{self.key}' (components: {there}); give the stage "
                "a reward that has it"
            )
        return scores if scores.ndim == 1 else torch.where(rollout.mask, scores, 0).sum(1)


@dataclass(frozen=True)
class PairsPerObjective:
    """Pairs of every group by each of several objectives, tagged with the objective in a column (both sides).

    A vector reward stays one: what is best by one objective may be worst by another, and the objectives do not
    filter each other's pairs. Source: arXiv 2510.01167, section 3.

    Attributes:
        keys: names of raw components, in the order of the column's numbers.
        min_gap: see `BestWorstPairSelector`.
        at_most: pairs of each objective, the first ones; all by default. Objectives on which siblings often agree have
            fewer pairs.
        column: int64 `[P]`, which objective.
    """

    keys: Sequence[str]
    min_gap: float = 0.0
    at_most: int | None = None
    column: str = "objective"

    def __post_init__(self) -> None:
        if isinstance(self.keys, str) or not self.keys or (self.at_most is not None and self.at_most < 1):
            raise ValueError(
                f"PairsPerObjective: keys={self.keys!r}, at_most={self.at_most}; expected a list of components, and at "
                "least one pair of each"
            )

    @property
    def knobs(self) -> tuple[Knob, ...]:
        """It reads none."""
        return ()

    def __call__(self, rollout: Rollout, knobs: Mapping[str, float], cast: Mapping[str, Any]) -> Rollout:
        """The pairs of the first objective, then those of the second, ...

        Raises:
            ValueError: the rollout has no such component.
        """
        parts = []
        for place, key in enumerate(self.keys):
            tag = torch.full((len(rollout),), place, device=rollout.mask.device)
            select = BestWorstPairSelector(key, self.min_gap)
            parts.append(select(rollout.with_columns(**{self.column: tag}), knobs, cast)[: self.at_most])
        return Rollout.cat(parts)
