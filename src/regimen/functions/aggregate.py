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


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` where `mask` is true; 0 where it is true nowhere. Shapes `[...]` equal; result `[]`."""
    if values.shape != mask.shape:
        raise ValueError(f"masked_mean: values {list(values.shape)} and mask {list(mask.shape)} differ")
    return torch.where(mask, values, 0).sum() / mask.sum().clamp(min=1)


def mean_of(values: Tensor) -> Tensor:
    """Mean of all values, `[]`; 0 of none."""
    return values.sum() / max(values.numel(), 1)
