"""How a loss per step `[B, T]` becomes one number: which step counts how much."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

Aggregate = Literal["sequence", "segment", "token", "constant"]


def aggregate_weights(
    mask: Tensor, aggregate: Aggregate = "sequence", horizon: int | None = None, segment: Tensor | None = None
) -> Tensor:
    """Weights `[B, T]` with which the sum of a loss per step is its aggregate over a batch.

    - `"sequence"`: mean over a sample's steps, then over samples that have any (GRPO, Shao et al. 2024, eq. 3);
    - `"segment"`: mean over a segment's steps (a turn, a span of a text), then over all segments that have any;
    - `"token"`: mean over all steps of the batch (DAPO, Yu et al. 2025, eq. 8);
    - `"constant"`: sum over steps divided by `B * horizon` (Dr. GRPO, Liu et al. 2025), `horizon` = `T` unless
      given, so that long samples are not down-weighted.

    Weights are computed once for a whole batch; any split of it into micro-batches then sums to the same loss.

    Args:
        mask: bool `[B, T]`, steps that are learned from.
        aggregate: one of the above.
        horizon: steps per sample for `"constant"`.
        segment: int64 `[B, T]`, for `"segment"`: which segment of its sample a step belongs to.

    Raises:
        ValueError: unknown aggregate, a mask that is not two-dimensional, a horizon below 1, or no segments.
    """
    if horizon is not None and horizon < 1:
        raise ValueError(f"aggregate_weights: horizon is {horizon}, expected at least 1")
    if mask.ndim != 2:
        raise ValueError(f"aggregate_weights: mask has shape {list(mask.shape)}, expected [B, T]")
    weights = mask.to(torch.get_default_dtype())
    if aggregate == "token":
        return weights / weights.sum().clamp(min=1)
    if aggregate == "constant":
        return weights / (mask.shape[0] * (mask.shape[1] if horizon is None else horizon))
    if aggregate == "segment":
        if segment is None or segment.shape != mask.shape:
            given = "none" if segment is None else f"of shape {list(segment.shape)}"
            raise ValueError(
                f"aggregate_weights: 'segment' needs segments {list(mask.shape)}, given are {given}; collect with a "
                "task that marks them (a DialogueTask), or use 'sequence'"
            )
        return _per_segment(weights, segment)
    if aggregate == "sequence":
        lengths = weights.sum(1, keepdim=True)
        return weights / lengths.clamp(min=1) / (lengths > 0).sum().clamp(min=1)
    raise ValueError(f"aggregate '{aggregate}' is not one of {', '.join(get_args(Aggregate))}")


def _per_segment(weights: Tensor, segment: Tensor) -> Tensor:
    first, last = int(segment.min()), int(segment.max())
    sample = torch.arange(len(segment), device=segment.device)[:, None]
    key = (sample * (last - first + 1) + segment - first).flatten()
    steps = weights.new_zeros(int(key[-1]) + last - first + 1).index_add_(0, key, weights.flatten())
    return weights / steps[key].view_as(weights).clamp(min=1) / (steps > 0).sum().clamp(min=1)


def group_weights(group: Tensor, share: Tensor | None = None) -> Tensor:
    """Weights `[B]` with which a sum over samples is a mean over groups of the means within them.

    Groups that are not there leave the others' weights at sum 1: with shares `a`, group `g` counts
    `a_g / sum of a over those present`, however many samples it has.

    Args:
        group: int64 `[B]`.
        share: `[G]`, what group 0, 1, ... counts; all the same by default.

    Raises:
        ValueError: no samples, a group beyond the shares, or shares of which none of those present is above 0.
    """
    if not len(group):
        raise ValueError("group_weights: there are no samples, so no group has a mean; give at least one")
    if share is not None and not 0 <= int(group.min()) <= int(group.max()) < len(share):
        raise ValueError(
            f"group_weights: groups {group.unique().tolist()[:5]} and {len(share)} shares; expected a share for each"
        )
    present, place, count = group.unique(return_inverse=True, return_counts=True)
    shares = torch.ones(len(present), device=group.device) if share is None else share.to(group.device)[present]
    if not bool((shares >= 0).all()) or float(shares.sum()) <= 0:
        raise ValueError(
            f"group_weights: the groups {present.tolist()[:5]} have shares {shares.tolist()[:5]}; expected at least 0, "
            "and one above 0"
        )
    return (shares / shares.sum() / count)[place]


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where it is true nowhere. Shapes `[...]` equal; result `[]`."""
    if values.shape != mask.shape:
        raise ValueError(f"masked_mean: values {list(values.shape)} and mask {list(mask.shape)} differ")
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def mean_of(values: Tensor) -> Tensor:
    """Mean of all values, `[]`; 0 of none."""
    return values.mean() if values.is_floating_point() and values.numel() else values.sum() / max(values.numel(), 1)
